"""Every failure a user may meet, each with the exit code the command line ends with.

A message is one line: what failed, for which thing, expected, got, and one thing to do next.
Ranges: 10s configuration and input, 20s adapters, 30s routing, 40s population, 50s federation,
60s plugins.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

__all__ = [
    "AdapterError",
    "AdmissionError",
    "BankError",
    "BaseCheckpointError",
    "CascadeError",
    "CharterError",
    "ComputeError",
    "ConfigError",
    "CorpusError",
    "DivergedError",
    "ExpertError",
    "FederationError",
    "IncompatibleAdapterError",
    "LedgerError",
    "MoloraError",
    "PluginError",
    "PopulationError",
    "PortTakenError",
    "RoutingError",
    "ServerUnreachableError",
    "ShapeError",
    "SignatureError",
    "StorageError",
    "StudyError",
    "SumError",
    "SumRefusedError",
    "TraceError",
    "TrainingError",
    "UnknownNameError",
    "describe_disabled",
    "describe_mismatch",
    "list_offenders",
]


def describe_mismatch(what: str, *, expected: object, got: object, fix: str) -> str:
    """Compose the one-line message of the error template.

    Args:
        what: What failed and for which thing, e.g. "Cannot fuse contribution 'legal-07'".
        expected: What was needed.
        got: What was found.
        fix: One thing to do next, a full sentence.

    Returns:
        `<what>: expected <expected>, got <got>. <fix>`
    """
    return f"{what}: expected {expected}, got {got}. {fix}"


def list_offenders(offenders: Sequence[str], *, shown: int = 5) -> str:
    """Some of what is wrong, and how many more there are, in one line.

    Args:
        offenders: What is wrong, one text each.
        shown: Named at most.
    """
    more = len(offenders) - shown
    return "; ".join(offenders[:shown]) + (f"; and {more} more" if more > 0 else "")


class MoloraError(Exception):
    """Base of all errors shown to users as a single line."""

    exit_code = 1


class ConfigError(MoloraError, ValueError):
    """An option or a setting is wrong."""

    exit_code = 10


class CharterError(ConfigError):
    """A charter or an amendment is malformed or contradicts another."""

    exit_code = 11


class CorpusError(ConfigError):
    """Text could not be read, or there is too little of it."""

    exit_code = 12


class BaseCheckpointError(ConfigError):
    """A base checkpoint is missing, unreadable or not the one expected."""

    exit_code = 13


class ComputeError(ConfigError):
    """A device or a dtype is not there, or memory is too small."""

    exit_code = 15


class StorageError(MoloraError, OSError):
    """The disk refused: full, read-only or not permitted."""

    exit_code = 14


class AdapterError(MoloraError, ValueError):
    """An adapter's files are malformed, too large or unsafe."""

    exit_code = 20


class IncompatibleAdapterError(AdapterError):
    """An adapter does not fit the base checkpoint."""

    exit_code = 21


class AdmissionError(AdapterError):
    """A contribution was refused by an admission check."""

    exit_code = 22


class SignatureError(AdapterError):
    """A signature does not verify, or a key cannot be used."""

    exit_code = 23


class TrainingError(AdapterError):
    """Training cannot start, go on or be resumed."""

    exit_code = 24


class DivergedError(TrainingError):
    """A training whose loss is not finite."""


class LedgerError(MoloraError, ValueError):
    """The ledger refused a change that would break its rules."""

    exit_code = 25


class TraceError(MoloraError, ValueError):
    """A trace cannot be written, read, sealed or proved from."""

    exit_code = 26


class RoutingError(MoloraError, ValueError):
    """A router cannot be fitted or used this way."""

    exit_code = 30


class ShapeError(RoutingError):
    """A tensor has the wrong shape."""

    exit_code = 31


class BankError(RoutingError):
    """A bank lacks a column, or one does not belong to it."""

    exit_code = 32


class ExpertError(BankError):
    """One expert's numbers cannot be used; the others' may be.

    Attributes:
        expert: Its name.
    """

    def __init__(self, message: str, expert: str) -> None:
        super().__init__(message)
        self.expert = expert


class SumError(MoloraError, ValueError):
    """A sum over members cannot be made, or a member's part of it cannot be used."""

    exit_code = 34


class SumRefusedError(SumError):
    """A coordinator asks members for more than a sum may show."""

    exit_code = 35


class CascadeError(MoloraError, ValueError):
    """A cascade is described wrongly, or a run of one cannot go on."""

    exit_code = 33


class PopulationError(MoloraError, ValueError):
    """A population is malformed, does not fit its base, or cannot be evolved this way."""

    exit_code = 40


class QuestionRefusedError(PopulationError):
    """A coordinator asks a contributor for more than the charter says."""

    exit_code = 41


class FederationError(MoloraError, RuntimeError):
    """The federation's processes or messages failed."""

    exit_code = 50


class ServerUnreachableError(FederationError):
    """No server answers at the address."""

    exit_code = 51


class PortTakenError(FederationError):
    """A port that is needed is in use."""

    exit_code = 52


class PluginError(MoloraError, RuntimeError):
    """A plugin broke a rule of registration or of its contract."""

    exit_code = 60


class StudyError(MoloraError, RuntimeError):
    """A study is planned wrongly, or some of its tasks failed."""


def describe_disabled(plugin: str) -> str:
    """What to do about a name that a disabled plugin registers.

    Args:
        plugin: Name of its entry point.
    """
    return (
        f"It is registered by the disabled plugin {plugin}: enable it with `molora plugins enable "
        f"{plugin}`."
    )


class UnknownNameError(MoloraError, KeyError):
    """A name is registered by nobody; lists near names, all names and plugins not loaded."""

    exit_code = 61

    def __init__(
        self,
        kind: str,
        name: str,
        known: Iterable[str],
        failures: Sequence[str] = (),
        disabled: str = "",
    ) -> None:
        names = sorted(known)
        near = get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
        self.message = (
            f"Unknown {kind} '{name}': expected one of {', '.join(names) or '(none registered)'}."
            f"{hint} See `molora plugins list`."
        )
        if disabled:
            self.message += f" {describe_disabled(disabled)}"
        if failures:
            self.message += f" Plugins that failed to load: {' '.join(failures)}"
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message  # KeyError would print the repr, with quotes around it
