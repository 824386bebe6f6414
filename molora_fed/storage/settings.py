"""Settings from files and people: strict models, options of what is registered, one-line errors."""

from collections.abc import Mapping
from pathlib import Path
from stat import S_ISREG
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from molora_fed.errors import MoloraError
from molora_fed.guard import guarded
from molora_fed.plugins import Registry
from molora_fed.storage.untrusted import clean, parse_json

__all__ = [
    "StrictModel",
    "UntrustedModel",
    "check_options",
    "describe_offenders",
    "open_options",
    "read_model",
]

_SHOWN = 8  # offenders named in one message
_CHARACTERS = 200  # of each

Model = TypeVar("Model", bound=BaseModel)


class StrictModel(BaseModel):
    """Base of what is read from files: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class UntrustedModel(StrictModel):
    """Base of what strangers send: types as they are written, numbers finite."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


def describe_offenders(
    error: ValidationError, *, whole: str = "options", with_values: bool = False
) -> str:
    """Name the keys that are wrong, and why, in one line.

    Args:
        error: Of pydantic.
        whole: Name of the whole, where no single key is wrong.
        with_values: Whether to repeat the values; only those that the reader wrote.
    """
    return "; ".join(
        clean(
            f"{clean('.'.join(map(str, item['loc'])), 80) or whole}: {item['msg']}"
            + (f" (got {item['input']!r})" if with_values else ""),
            _CHARACTERS,
        )
        for item in error.errors(include_url=False)[:_SHOWN]
    )


def check_options(
    options_type: type[Model],
    raw: Mapping[str, Any] | None,
    *,
    what: str,
    error: type[MoloraError],
    fix: str,
) -> Model:
    """Check options against their model.

    Args:
        options_type: Pydantic model of the options.
        raw: Keys and values; None or empty takes all defaults.
        what: What failed, the start of the message.
        error: Class of the error.
        fix: What to do next, one sentence.

    Raises:
        MoloraError: Of the class given, if a key is unknown or a value out of range; all are named.
    """
    try:
        return options_type.model_validate(dict(raw or {}))
    except ValidationError as wrong:
        known = ", ".join(options_type.model_fields) or "none"
        raise error(
            f"{what}: expected valid values among the keys {known}, got "
            f"{describe_offenders(wrong)}. {fix}"
        ) from wrong


def open_options(
    registry: Registry,
    name: str,
    raw: Mapping[str, Any] | None,
    *,
    error: type[MoloraError],
    fix: str,
) -> tuple[Any, Any]:
    """Find what is registered under a name, and check its options.

    Args:
        registry: Where the name is looked up.
        name: Registered name.
        raw: Its options.
        error: Class of the error about options.
        fix: What to do next, one sentence.

    Returns:
        The registered class or function, and an instance of its `Options`; a function has none.

    Raises:
        UnknownNameError: If nobody registers the name.
        PluginError: If the plugin cannot be imported, breaks its contract, or its `Options` fail.
        MoloraError: Of the class given, if the options are wrong.
    """
    target = registry.resolve(name)
    what, model = f"Cannot use {registry.kind} '{name}'", getattr(target, "Options", StrictModel)
    with guarded(registry.entry(name), "reading options", passing=(error,)):
        return target, check_options(model, raw, what=what, error=error, fix=fix)


def read_model(
    path: Path,
    model: type[Model],
    *,
    what: str,
    error: type[MoloraError],
    fix: str,
    max_bytes: int,
) -> Model:
    """Read a bounded JSON file whose sender is not trusted.

    Args:
        path: The file.
        model: What it has to hold.
        what: What failed, the start of the message.
        error: Class of the error.
        fix: What to do next, one sentence.
        max_bytes: Largest file that is read.

    Raises:
        MoloraError: Of the class given, if the file is missing, too large, not JSON or malformed.
    """
    cause: Exception | None = None
    expected = f"a readable '{path.name}'"
    try:
        if not S_ISREG(path.stat().st_mode):  # to open a pipe would wait for its other end
            expected = f"a regular file '{path.name}'"
            raise ValueError("something else")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) <= max_bytes:
            expected = f"JSON in '{path.name}'"
            content = parse_json(data, max_bytes=max_bytes)
            expected = f"known keys with valid values in '{path.name}'"
            return model.model_validate(content)
        expected, got = f"at most {max_bytes} bytes in '{path.name}'", "more"
    except ValidationError as wrong:
        cause, got = wrong, describe_offenders(wrong, whole=path.name)
    except OSError as wrong:
        cause, got = wrong, wrong.strerror or type(wrong).__name__
    except ValueError as wrong:
        cause, got = wrong, clean(wrong, _CHARACTERS)
    raise error(f"{what}: expected {expected}, got {got}. {fix}") from cause
