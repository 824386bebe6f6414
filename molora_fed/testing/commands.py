"""Conformance checks of commands, in a process of its own.

`check_command_conformance("my_package.command:run")` is the whole test of how a command is built.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from molora_fed.guard import one_line
from molora_fed.testing.findings import CheckResult, refuse_broken
from molora_fed.testing.targets import Target, describe_target, examine_target

__all__ = ["check_command_conformance", "examine_command"]

HEAVY = ("flwr", "peft", "torch", "transformers")
"""What the help of a command must not load: it takes seconds."""

LIMIT_SECONDS = 120

# What the process prints: as JSON, in its last line.
_SCRIPT = """
import contextlib, functools, importlib, inspect, io, json, sys
name, heavy = sys.argv[1], sys.argv[2].split(",")
said = {}
try:
    import typer
    from typer.main import get_command
    module, _, path = name.partition(":")
    target = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    app = target
    if not isinstance(target, typer.Typer):
        said["undocumented"] = [] if inspect.getdoc(target) else [path]
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command()(target)
    command = get_command(app)
    if app is target:
        parts = getattr(command, "commands", {})
        said["undocumented"] = [n for n, one in parts.items() if not (one.help or one.hidden)]
        if not (command.help or target.info.help):
            said["undocumented"].insert(0, path)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            code = command(["--help"], prog_name="molora", standalone_mode=False)
        except SystemExit as left:
            code = left.code
    said["help"], said["code"] = out.getvalue(), code or 0
except Exception as error:
    said["error"] = type(error).__name__ + ": " + str(error)
said["heavy"] = [one for one in heavy if one in sys.modules]
print(json.dumps(said))
"""


def check_command_conformance(command: str, options: Any = None) -> None:
    """Check that a command can be built, says what it does, and is light until it is run.

    Args:
        command: The target as it is registered: a "module:attr" string.
        options: None; commands have arguments.

    Raises:
        PluginError: Naming every rule that is broken, with what was found.
    """
    title = describe_target("command", command)
    refuse_broken(title, examine_command(command, options), page="docs/hooks/commands.md")


def examine_command(command: str, options: Any = None) -> tuple[CheckResult, ...]:
    """What `check_command_conformance` finds, one result a check.

    Args:
        command: The target as it is registered: a "module:attr" string.
        options: None; commands have arguments.
    """
    return examine_target(_CHECKS, _Case(command, options), contract=_check_string)


def _check_string(target: Any) -> str | None:
    if isinstance(target, str) and ":" in target:
        return None
    found = f"'{target}'" if isinstance(target, str) else type(target).__name__
    return (
        f"expected a 'module:attr' string, so that `molora --help` imports no command, got {found}"
    )


@dataclass(frozen=True)
class _Case(Target):
    @cached_property
    def said(self) -> dict[str, Any]:
        """What a fresh process says of the command."""
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, self.target, ",".join(HEAVY)],
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        lines = done.stdout.splitlines()
        try:
            found: dict[str, Any] = json.loads(lines[-1])
        except (IndexError, ValueError):
            return {"error": f"exit code {done.returncode}: {done.stderr}", "heavy": []}
        return found


def _is_built_by_typer(case: _Case) -> str | None:
    if "error" not in case.said:
        return None
    return f"expected a command that Typer can build, got {one_line(case.said['error'])}"


def _has_a_docstring(case: _Case) -> str | None:
    undocumented = case.said.get("undocumented", [])
    if not undocumented:
        return None
    return f"expected a docstring as help, got none of {', '.join(undocumented)}"


def _shows_its_help(case: _Case) -> str | None:
    said = case.said
    if "error" in said or (said["code"] == 0 and "Usage" in said["help"]):
        return None
    return f"expected --help to print the usage and exit with 0, got code {said['code']}"


def _is_light_until_it_runs(case: _Case) -> str | None:
    if not case.said["heavy"]:
        return None
    return (
        f"expected --help without {', '.join(HEAVY)}, got {', '.join(case.said['heavy'])}: import "
        "them inside the function"
    )


_CHECKS: tuple[Callable[[_Case], str | None], ...] = (
    _is_built_by_typer,
    _has_a_docstring,
    _shows_its_help,
    _is_light_until_it_runs,
)
