"""The one guard around code of plugins: whatever it raises becomes one line that names the plugin.

What a plugin is called for stands at the place of the call: `with guarded(entry, "fit"): ...`.
What comes back is checked there too, by `refuse`, before anything is recorded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from types import FrameType, TracebackType

from molora_fed.errors import MoloraError, PluginError, StorageError
from molora_fed.plugins import Entry

__all__ = ["describe_error", "guarded", "one_line", "refuse"]

_CHARACTERS = 300  # of a plugin's own text in one message
_OWN_CODE = Path(__file__).parent


def one_line(text: str, limit: int = _CHARACTERS) -> str:
    """A text of a stranger as one line of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


@contextmanager
def guarded(
    entry: Entry, place: str, *, passing: tuple[type[BaseException], ...] = ()
) -> Iterator[None]:
    """Run code of a plugin; what it raises becomes an error that names it.

    Args:
        entry: What is called.
        place: What it is called for, e.g. "fit".
        passing: Errors that are part of the contract and go through as they are.

    Raises:
        PluginError: For every failure but an interruption. An error that the core's own plugins
            raise deliberately, or that names the plugin already, keeps its class and its text.
    """
    try:
        yield
    except StorageError:  # a full disk is nobody's fault
        raise
    except passing:
        raise
    except MoloraError as error:
        if entry.is_own or entry.origin in str(error):
            raise
        raise _fail(entry, place, str(error)) from error
    except (Exception, SystemExit) as error:
        if entry.is_own and isinstance(error, OSError):
            raise  # a missing file of the user's, which the command line explains
        raise _fail(entry, place, describe_error(error, entry)) from error


def refuse(entry: Entry, place: str, *, expected: object, got: object) -> PluginError:
    """The error of a plugin that gave back what its contract does not allow.

    Args:
        entry: What was called.
        place: What it was called for.
        expected: What the contract asks for.
        got: What came back.
    """
    return _fail(entry, place, f"expected {expected}, got {one_line(str(got))}")


def describe_error(error: BaseException, entry: Entry) -> str:
    """Class and text of an error, and the line of the plugin that it came from.

    Args:
        error: What the plugin raised.
        entry: What was called.
    """
    try:
        text = str(error)
    except Exception:  # a plugin's error may fail to describe itself
        text = ""
    where = _find_line(error.__traceback__, entry)
    named = one_line(f"{type(error).__name__}: {text}" if text else type(error).__name__)
    return f"{named}, at {where}" if where else named


def _fail(entry: Entry, place: str, reason: str) -> PluginError:
    advice = "Correct or uninstall it, or leave it out with MOLORA_LOAD_PLUGINS."
    if entry.is_own:
        advice = "Run again with MOLORA_DEBUG=1 to see where, and report it."
    elif entry.is_file:
        advice = "Correct it."
    end = "" if reason.endswith((".", "…")) else "."
    return PluginError(f"{entry.title} failed in {place}: {reason}{end} {advice}")


def _find_line(traceback: TracebackType | None, entry: Entry) -> str | None:
    """The innermost line of the plugin's own package, else of any code but the core's."""
    target = entry.target
    module = target.partition(":")[0] if isinstance(target, str) else _module_of(target)
    package = str(module).partition(".")[0]
    frames = [(frame, line) for frame, line in walk_tb(traceback)]
    own = [each for each in frames if _package_of(each[0]) == package]
    others = [each for each in frames if not _is_core(each[0])]
    for frame, line in reversed(own or others):
        return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{line}"
    return None


def _module_of(target: object) -> str:
    return str(getattr(target, "__module__", type(target).__module__))


def _package_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _is_core(frame: FrameType) -> bool:
    file = Path(frame.f_code.co_filename)
    return _OWN_CODE in file.parents or file.name == "contextlib.py"
