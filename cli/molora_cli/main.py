"""The `molora` command: how commands are found, and how a failure becomes a line and an exit code.

All commands, its own and those of plugins, come through the hook `register_commands`. A command is
imported when it is invoked, so that `molora --help` loads no heavy library.
"""

import difflib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click
import typer
from typer.core import TyperGroup
from typer.main import get_group

from molora_cli.commands import GROUPS, OWN
from molora_cli.output import MAX_LINE, note
from molora_fed import __version__
from molora_fed.errors import MoloraError, PluginError, StorageError, describe_disabled
from molora_fed.storage.untrusted import clean

if TYPE_CHECKING:
    from molora_fed.plugins import Entry, Plugins

__all__ = ["app", "build_command", "main", "run"]

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
BROKEN_PIPE = 128 + signal.SIGPIPE
DEBUG = "MOLORA_DEBUG"


def _get_plugins() -> "Plugins":
    from molora_fed.plugins import get_plugins

    return get_plugins()


class CommandGroup(TyperGroup):
    """The registered commands; each is imported only when it is invoked."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Own commands in the order of the help, then those of plugins by name."""
        own = [name for name, _, _ in OWN]
        return [*own, *(name for name in _get_plugins().commands.names() if name not in own)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command.

        Raises:
            PluginError: If that fails.
        """
        registry = _get_plugins().commands
        if cmd_name not in registry.names():
            return None
        target = registry.resolve(cmd_name)
        try:
            return _guard_command(build_command(cmd_name, target), registry.entry(cmd_name))
        except Exception as error:
            raise PluginError(
                f"Cannot use command '{cmd_name}' of {registry.entry(cmd_name).origin}: expected a "
                f"Typer app or a function that Typer can call, got {type(error).__name__}: "
                f"{error}. Correct or uninstall the plugin."
            ) from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command; that plugins failed is told once, whatever is invoked.

        The error of an unknown command lists near names and failed plugins too.
        """
        try:
            found = super().resolve_command(ctx, args)
            if "--help" not in args:
                for failure in _get_plugins().failures:
                    note(str(failure))
            return found
        except click.UsageError as error:
            message = error.message
            near = difflib.get_close_matches(args[0], self.list_commands(ctx))
            if near:
                names = ", ".join(map(repr, near))
                message = f"{message.rstrip('.')}. Did you mean {names}?"
            failures = [str(failure) for failure in _get_plugins().failures]
            if disabled := _get_plugins().commands.disabled.get(args[0]):
                failures.insert(0, describe_disabled(disabled))
            raise click.UsageError(" ".join([message, *failures]), error.ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List commands by who uses them, plugins' last, and plugins that could not be loaded."""
        plugins = _get_plugins()
        own = {name for name, _, _ in OWN}
        others = [(e.name, e.summary) for e in plugins.commands if e.name not in own]
        for title, commands in GROUPS.items():
            rows = [(name, summary) for name, _, summary in commands]
            is_last = title == list(GROUPS)[-1]
            with formatter.section(title):
                formatter.write_dl([*rows, *others] if is_last else rows)
        if plugins.failures:
            with formatter.section("Plugins left out"):
                for failure in plugins.failures:
                    formatter.write_text(str(failure))


def _guard_command(command: click.Command, entry: "Entry") -> click.Command:
    """A stranger's command that names its plugin if it fails; an own one as it is."""
    if entry.is_own:
        return command
    from molora_fed.guard import guarded

    passing = (click.ClickException, click.Abort, click.exceptions.Exit, SystemExit, OSError)
    run_plainly = command.invoke

    def invoke(ctx: click.Context) -> Any:
        with guarded(entry, "running", passing=(*passing, MoloraError)):
            return run_plainly(ctx)

    command.invoke = invoke  # type: ignore[method-assign]
    return command


class PlainFormatter(click.HelpFormatter):
    """Help as plain text: Typer escapes brackets for markup, which is switched off here."""

    def write_dl(
        self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2
    ) -> None:
        """Write terms and what they mean, without the escapes."""
        plain = [(term, text.replace("\\[", "[")) for term, text in rows]
        super().write_dl(plain, col_max, col_spacing)


click.Context.formatter_class = PlainFormatter


def build_command(name: str, target: object) -> click.Command:
    """A command of a Typer app or a function, named as it is registered."""
    parent = typer.Typer(add_completion=False, rich_markup_mode=None)
    parent.callback()(lambda: None)
    if isinstance(target, typer.Typer):
        parent.add_typer(target, name=name)
    else:
        parent.command(name)(target)  # type: ignore[type-var]
    return get_group(parent).commands[name]


app = typer.Typer(
    name="molora",
    cls=CommandGroup,
    help="Fuse independently trained specialists of one shared checkpoint into one model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"molora-fed {__version__}")
        raise typer.Exit


def _name_files(given: list[str] | None) -> None:
    """Add one-file plugins to those of the environment, which other processes get, too."""
    if given:
        from molora_fed.plugins import get_plugins
        from molora_fed.storage.plugin_sources import FILES, find_plugin_file

        paths = [str(find_plugin_file(text).path) for text in given]
        os.environ[FILES] = os.pathsep.join([*filter(None, [os.environ.get(FILES)]), *paths])
        get_plugins.cache_clear()


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version."
    ),
    plugin: list[str] = typer.Option(
        None,
        "--plugin",
        metavar="FILE",
        callback=_name_files,
        is_eager=True,  # before the command is looked for, which may be the plugin's
        help="Load a one-file plugin, before the command; repeatable.",
    ),
) -> None:
    """Fuse independently trained specialists of one shared checkpoint into one model."""


class _StoppedError(BaseException):
    """Ctrl-C or SIGTERM; not KeyboardInterrupt, which Typer answers without a word."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def _stop_once(number: int, frame: FrameType | None) -> NoReturn:
    """Stop at the first signal, and let the clean-up run through any further one."""
    for each in _STOPPING:
        signal.signal(each, lambda *_: None)
    raise _StoppedError(number)


def main() -> NoReturn:
    """Run the command line; the console script's entry point.

    Raises:
        SystemExit: Always, with the exit code.
    """
    for each in _STOPPING:
        if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN:  # nohup stays nohup
            signal.signal(each, _stop_once)
    if not os.environ.get(DEBUG):
        # Libraries warn of their own affairs; what concerns the user, our errors say.
        warnings.simplefilter("ignore")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command, explain in one line what ended it, and give its exit code."""
    try:
        code = app(arguments, standalone_mode=False)
        sys.stdout.flush()
    except BaseException as error:
        return _explain(error)
    return code if isinstance(code, int) else 0


def _explain(error: BaseException) -> int:
    """Print one line about what ended the command, and give its exit code."""
    if os.environ.get(DEBUG) and not isinstance(
        error, click.ClickException | SystemExit | _StoppedError
    ):
        traceback.print_exception(error)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        # Python would complain about the closed pipe once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    if isinstance(error, click.Abort):  # end of input, or Ctrl-C, at a question
        error = _StoppedError(signal.SIGINT)
    if isinstance(error, _StoppedError):
        _say("stopped. Run the same command again to resume.")
        return error.exit_code
    if isinstance(error, MoloraError):
        _say(str(error))
        return error.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        _say(f"Cannot use '{error.filename}': {error.strerror}. Check the path and its rights.")
        return StorageError.exit_code
    _say(
        f"Unexpected {type(error).__name__}: {error}. Run again with {DEBUG}=1 to see where, and "
        "report it."
    )
    return 1


def _say(message: str) -> None:
    print("error: " + clean(message, MAX_LINE), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
