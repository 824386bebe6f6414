"""The hooks a plugin may implement, entry-point group `molora_fed`, and what each may register.

Each hook hands the plugin a `register` callable, `register(name, target, *, summary, source)`:
`name` is lower-case-with-dashes, `target` the object or a "module:attr" string that is imported
on first use only, `summary` one line for `molora plugins list`, `source` the citation.
A hook exists only while a first-party plugin uses it.
"""

import inspect
from typing import Any, Protocol

import pluggy

GROUP = "molora_fed"

hookspec = pluggy.HookspecMarker(GROUP)


class Register(Protocol):
    """What every hook receives to register one thing with."""

    def __call__(self, name: str, target: object, *, summary: str, source: str) -> None:
        """Register `target` under `name`.

        Args:
            name: Lower-case words joined by dashes, unique within the hook.
            target: The object, or a "module:attr" string resolved on first use.
            summary: One line that says what it does.
            source: Citation: a paper with equation, or "own definition".

        Raises:
            PluginError: If the name is malformed or taken.
        """


@hookspec
def register_routers(register: Register) -> None:
    """Register routers: subclasses of `molora_fed.routing.contract.OutputRouter`."""


@hookspec
def register_gain_predictors(register: Register) -> None:
    """Register gain predictors: `(Case, Sequence[Outcome]) -> Forecast | None`.

    A function or a class with options, see `register_domains`.
    """


@hookspec
def register_admission_checks(register: Register) -> None:
    """Register admission checks: `(AdmissionCandidate) -> Finding | None`.

    A function or a class with options, see `register_domains`.
    """


@hookspec
def register_domains(register: Register) -> None:
    """Register domains: `() -> Iterable[Document]`, which read local text.

    A target of this hook and of others whose targets are called is a function, or a class with
    options whose instances are called so: a subclass of `molora_fed.Configurable`.
    """


@hookspec
def register_adapter_kinds(register: Register) -> None:
    """Register adapter kinds: subclasses of `molora_fed.adapters.AdapterKind`."""


@hookspec
def register_carried_files(register: Register) -> None:
    """Register carried files: callables `(CarriedContext) -> Mapping[str, Tensor]`."""


@hookspec
def register_merges(register: Register) -> None:
    """Register merges: `(Sequence[Adapter], *, name, seed) -> Adapter`, see `register_domains`."""


@hookspec
def register_commands(register: Register) -> None:
    """Register commands: `molora <name>` runs a Typer app or a function that Typer can call."""


@hookspec
def register_adapter_routers(register: Register) -> None:
    """Register adapter routers: subclasses of `molora_fed.population.contract.AdapterRouter`."""


@hookspec
def register_fitness_scopes(register: Register) -> None:
    """Register fitness scopes: `(LossTable) -> Fitness`, see `register_domains`."""


@hookspec
def register_lifecycle_operators(register: Register) -> None:
    """Register operators: subclasses of `molora_fed.population.contract.LifecycleOperator`."""


@hookspec
def register_extractors(register: Register) -> None:
    """Register extractors: callables `(CascadeTask, str) -> str | None`."""


@hookspec
def register_judges(register: Register) -> None:
    """Register judges: callables `(JudgeRequest) -> Verdict`, or subclasses of `Judge`."""


@hookspec
def register_escalation_policies(register: Register) -> None:
    """Register policies: subclasses of `molora_fed.cascade.contract.EscalationPolicy`."""


@hookspec
def register_task_families(register: Register) -> None:
    """Register task families: callables `(level, count, seed, split) -> Sequence[CascadeTask]`."""


_ROUTER_METHODS = (
    "reads", "fit", "scores", "gates", "init_state", "step", "reorder", "state_tensors",
)  # fmt: skip
_KIND_METHODS = ("prepare", "export", "load")


def check_callable(target: Any) -> str | None:
    """Describe why a function, or a class with options that is called once made, cannot be used.

    See `molora_fed.storage.options.Configurable`; None if it can.
    """
    if not inspect.isclass(target):
        return check_function(target)
    # Not by `callable`: every class can be called itself.
    if not any("__call__" in vars(base) for base in target.__mro__):
        return "expected a class whose instances can be called, got one without '__call__'"
    return _check_class(target, ())


def check_function(target: Any) -> str | None:
    """Describe why a target cannot be called, or return None."""
    return None if callable(target) else f"expected a callable, got {type(target).__name__}"


def check_router(target: Any) -> str | None:
    """Describe what a router class lacks, or return None."""
    return _check_class(target, _ROUTER_METHODS)


def check_adapter_kind(target: Any) -> str | None:
    """Describe what an adapter kind lacks, or return None."""
    problem = _check_methods(target, _KIND_METHODS)
    if problem is not None:
        return problem
    for name in ("narrow_learning_rate", "width_power"):
        value = getattr(target, name, None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e3:
            got = "none" if value is None else repr(value)
            return f"expected the class attribute '{name}', a number of at least 0, got {got}"
    takes = inspect.signature(target.load).parameters.values()
    if not any(one.name == "base" or one.kind is one.VAR_KEYWORD for one in takes):
        return (
            "expected load(folder, limits, *, name, base), got one without 'base', the weights of "
            "the base"
        )
    return None


def check_adapter_router(target: Any) -> str | None:
    """Describe what an adapter router class lacks, or return None."""
    return _check_class(target, ("build", "reads", "forward", "set_progress", "reset_slot"))


def check_operator(target: Any) -> str | None:
    """Describe what a lifecycle operator class lacks, or return None."""
    return _check_class(target, ("apply",))


def check_policy(target: Any) -> str | None:
    """Describe what an escalation policy class lacks, or return None."""
    return _check_class(target, ("choose",))


def _check_methods(target: Any, methods: tuple[str, ...]) -> str | None:
    if not inspect.isclass(target):
        return f"expected a class, got {type(target).__name__}"
    missing = [name for name in methods if not callable(getattr(target, name, None))]
    if missing:
        return f"expected the methods {', '.join(methods)}, got none named {', '.join(missing)}"
    if inspect.isabstract(target):
        abstract = ", ".join(sorted(getattr(target, "__abstractmethods__", ())))
        return f"expected a class without abstract methods, got {abstract}"
    return None


def _check_class(target: Any, methods: tuple[str, ...]) -> str | None:
    """The same for a class with options."""
    problem = _check_methods(target, methods)
    if problem is not None:
        return problem
    options = getattr(target, "Options", None)
    if not inspect.isclass(options) or not hasattr(options, "model_validate"):
        return "expected a pydantic model as attribute 'Options'"
    if getattr(options, "model_config", {}).get("extra") != "forbid":
        return "expected 'Options' to refuse unknown keys (extra='forbid')"
    return None
