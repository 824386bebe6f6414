"""The `molora` command: its verbs, and how every failure becomes one line and an exit code.

Verbs import what they need when they run, so that `molora --help` loads no heavy library.
"""

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import click
import typer

from molora_cli import (
    cascade,
    contribute,
    coop,
    demo,
    evaluate,
    evolve,
    forecast,
    fuse,
    generate,
    join,
    plugins,
    report,
    serve,
    study,
    trace,
    train,
)
from molora_fed import __version__
from molora_fed.errors import MoloraError, StorageError

__all__ = ["app", "main", "run"]

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
BROKEN_PIPE = 128 + signal.SIGPIPE
DEBUG = "MOLORA_DEBUG"

app = typer.Typer(
    name="molora",
    help="Fuse independently trained specialists of one shared checkpoint into one model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.add_typer(coop.app, name="coop")
app.command("serve")(serve.serve)
app.command("join")(join.join)
app.command("train")(train.train)
app.command("contribute")(contribute.contribute)
app.command("fuse")(fuse.fuse)
app.add_typer(evolve.app, name="evolve")
app.command("evaluate")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("report")(report.report)
app.add_typer(forecast.app, name="forecast")
app.command("study")(study.study)
app.add_typer(trace.app, name="trace")
app.add_typer(cascade.app, name="cascade")
app.add_typer(plugins.app, name="plugins")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"molora-fed {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version."
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
        _say("stopped. The same command goes on where it stopped.")
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
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
