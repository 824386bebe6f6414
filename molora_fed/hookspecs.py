"""The hooks a plugin may implement; entry-point group `molora_fed`.

Each hook hands the plugin a `register` callable, `register(name, target, *, summary, source)`:
`name` is lower-case-with-dashes, `target` the object or a "module:attr" string that is imported
on first use only, `summary` one line for `molora plugins list`, `source` the citation.
A hook exists only while a first-party plugin uses it.
"""

from typing import Protocol

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
