"""How a plugin is chosen by name, and what options it takes: `Choice` and `Configurable`.

Imports no torch: plugins and charters are read without it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Generic, get_args

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from typing_extensions import TypeVar

from molora_fed.errors import CharterError, MoloraError, PluginError
from molora_fed.guard import guarded
from molora_fed.plugins import Registry
from molora_fed.storage.settings import StrictModel, check_options

__all__ = [
    "Choice",
    "Choices",
    "Configurable",
    "PluginOptions",
    "check_choices",
    "find_clashes",
    "list_settings",
    "name_choices",
    "open_callable",
    "open_choice",
    "read_choice",
    "read_options",
]


class PluginOptions(StrictModel):
    """Base of the options of a plugin: unknown keys are refused, values never change."""


OptionsT = TypeVar("OptionsT", bound=PluginOptions, default=Any)


class Configurable(Generic[OptionsT]):
    """Base of a plugin that is called, and has options; see `open_callable`.

    A check, domain, gain predictor, fitness scope or merge is a plain function, or a class
    `Outlier(Configurable[OutlierOptions])` whose `__call__` takes what that function would.

    Attributes:
        Options: Pydantic model of its options: the class in brackets after `Configurable`.
        options: The options it was made with.
    """

    Options: ClassVar[type[PluginOptions]] = PluginOptions
    options: OptionsT

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        for base in vars(cls).get("__orig_bases__", ()):
            for argument in get_args(base):
                if isinstance(argument, type) and issubclass(argument, PluginOptions):
                    cls.Options = argument

    def __init__(self, options: OptionsT) -> None:
        self.options = options


class Choice(StrictModel):
    """A plugin as a charter names it: plainly, or by a table with a label and options.

    One without label and options is written as the plain name.

    Attributes:
        name: Registered name.
        label: What reports call it, so that one plugin can stand there with two settings; its
            name if empty.
        options: Its options; unknown keys are refused by it.
    """

    name: str
    label: str = Field(default="", pattern=r"^([a-z][a-z0-9]*(-[a-z0-9]+)*)?$", max_length=63)
    options: dict[str, Any] = Field(default={})

    @model_validator(mode="before")
    @classmethod
    def _read_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_serializer(mode="wrap")
    def _write(self, write: SerializerFunctionWrapHandler) -> Any:
        if not isinstance(self, Choice):  # in a copy that was made without being checked
            return write(self)
        if self.is_plain:
            return self.name
        return {key: value for key, value in write(self).items() if value}

    @property
    def key(self) -> str:
        """What reports call it: its label, or its name."""
        return self.label or self.name

    @property
    def is_plain(self) -> bool:
        """Whether it is a name and nothing else."""
        return not (self.label or self.options)


def name_choices(*names: str) -> tuple["Choice", ...]:
    """Plain choices of these names."""
    return tuple(Choice(name=name) for name in names)


def find_clashes(choices: Iterable[Choice]) -> list[str]:
    """What of these choices a report could not tell apart, one text each.

    The same plain name may come twice: it is one choice.
    """
    listed = list(choices)
    counts = Counter(choice.key for choice in listed)
    several = {one.key for one in listed if counts[one.key] > 1 and not one.is_plain}
    names = {(one.name, other.label) for one in listed for other in listed if one is not other}
    taken = {label for name, label in names if name == label} - several
    return [
        *(f"several called '{key}', which need labels that differ" for key in sorted(several)),
        *(f"the label '{label}', a name that is used beside it" for label in sorted(taken)),
    ]


def _check_distinct(choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
    clashes = find_clashes(choices)
    if clashes:
        raise ValueError(f"expected choices that can be told apart, got {'; '.join(clashes)}")
    return choices


Choices = Annotated[tuple[Choice, ...], AfterValidator(_check_distinct)]
"""Plugins of one hook in a charter, each with a key of its own."""


def list_settings(registry: Registry, choices: Iterable[Choice]) -> list[Choice]:
    """Every registered plugin of a hook by name, with options where a choice gives some.

    Args:
        registry: Of the hook.
        choices: Options of some; one with a label comes beside the plugin itself.

    Returns:
        Sorted by key.
    """
    given = {choice.key: choice for choice in choices}
    named = {entry.name: Choice(name=entry.name) for entry in registry}
    return [choice for _, choice in sorted({**named, **given}.items())]


def read_options(
    registry: Registry,
    name: str,
    options: Mapping[str, Any] | None,
    *,
    error: type[MoloraError],
    fix: str,
) -> tuple[Any, Any]:
    """The target of a name, and its options; a function has none.

    Args:
        registry: Where the name is looked up.
        name: Registered name.
        options: Keys and values; None or empty takes all defaults.
        error: Class of the error about options.
        fix: What to do next, one sentence.

    Raises:
        UnknownNameError: If nobody registers the name.
        PluginError: If the plugin cannot be imported, or breaks its contract.
        MoloraError: Of the class given, if the options are wrong; all offending keys are named.
    """
    target = registry.resolve(name)
    # A function has no options: none are known.
    model = getattr(target, "Options", PluginOptions)
    what = f"Cannot use {registry.kind} '{name}'"
    return target, check_options(model, options, what=what, error=error, fix=fix)


def open_callable(
    registry: Registry,
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    error: type[MoloraError] = CharterError,
    fix: str = "Correct its options.",
) -> Any:
    """What is called for a registered name: the function, or an instance with its options.

    Args:
        registry: See `read_options`.
        name: See `read_options`.
        options: See `read_options`.
        error: See `read_options`.
        fix: See `read_options`.

    Raises:
        PluginError: If the plugin cannot be imported, or fails on being made.
        MoloraError: See `read_options`.
    """
    target, chosen = read_options(registry, name, options, error=error, fix=fix)
    if not isinstance(target, type):
        return target
    with guarded(registry.entry(name), "construction"):
        return target(chosen)


def read_choice(registry: Registry, choice: Choice, *, key: str) -> tuple[Any, Any]:
    """The target of a choice of a charter, and its options.

    Args:
        registry: Where its name is looked up.
        choice: The choice.
        key: The charter's key that it stands under, e.g. "fusion.merges".

    Raises:
        CharterError: If its options are wrong; all offending keys are named.
        MoloraError: See `read_options`.
    """
    fix = _say_where(choice, key)
    return read_options(registry, choice.name, choice.options, error=CharterError, fix=fix)


def open_choice(registry: Registry, choice: Choice, *, key: str) -> Any:
    """What is called for a choice of a charter; see `read_choice` and `open_callable`."""
    fix = _say_where(choice, key)
    return open_callable(registry, choice.name, choice.options, fix=fix)


def _say_where(choice: Choice, key: str) -> str:
    called = f" of '{choice.label}'" if choice.label else ""
    return f"Correct the options{called} in amendment.{key}."


def check_choices(chosen: Iterable[tuple[Registry, str, Iterable[Choice]]]) -> None:
    """Refuse names that nobody registers, then options that plugins do not know.

    A plugin that cannot be imported is refused where it is asked for options.

    Args:
        chosen: Registry, the charter's key, and what stands under it.

    Raises:
        UnknownNameError: If nobody registers a name.
        PluginError: If a plugin with options cannot be imported.
        CharterError: If options are wrong; everything that is wrong is named.
    """
    listed = [(registry, key, choice) for registry, key, some in chosen for choice in some]
    for registry, _, choice in listed:
        registry.entry(choice.name)
    problems: list[str] = []
    for registry, key, choice in listed:
        try:
            read_choice(registry, choice, key=key)
        except CharterError as error:
            problems.append(str(error))
        except PluginError:
            if choice.options:
                raise
    if problems:
        raise CharterError(" ".join(problems))
