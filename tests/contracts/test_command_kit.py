"""Every registered command keeps the contract; broken ones are caught."""

import pytest

from molora_fed.errors import PluginError
from molora_fed.plugins import load_plugins
from molora_fed.testing import check_command_conformance, examine_command

COMMANDS = load_plugins().commands

MODULE = '''
import typer

app = typer.Typer(help="Two commands.")


@app.command()
def one() -> None:
    """The first."""


@app.command()
def two() -> None:
    pass


def good(name: str, times: int = 1) -> None:
    """Say a name."""


def silent(name: str) -> None:
    pass


def unbuildable(name: object) -> None:
    """Takes what no command line has."""


def run_at_once() -> None:
    """Leaves."""


value = 3
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that the kit's process finds."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text=MODULE, name="made_up_commands"):
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


@pytest.mark.parametrize("name", COMMANDS.names())
def test_registered_command_conforms(name):
    check_command_conformance(COMMANDS.entry(name).target)


def test_a_function_conforms(module):
    results = examine_command(f"{module()}:good")
    assert [one.problem for one in results] == [None] * 5


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        ("silent", "expected a docstring as help, got none of silent"),
        ("app", "expected a docstring as help, got none of two"),
        ("unbuildable", "expected a command that Typer can build, got RuntimeError"),
        ("value", "expected a command that Typer can build, got"),
        ("nothing", "got AttributeError: module 'made_up_commands' has no attribute 'nothing'"),
    ],
)
def test_broken_command_is_caught(module, attribute, reason):
    with pytest.raises(PluginError, match=reason):
        check_command_conformance(f"{module()}:{attribute}")


def test_a_command_that_loads_a_heavy_library_is_caught(module):
    name = module('import peft\n\n\ndef run() -> None:\n    """Late."""\n', "heavy_commands")
    # A stand-in: loading the real one takes seconds.
    module("", "peft")
    with pytest.raises(PluginError, match=r"--help without .*got peft: import them inside"):
        check_command_conformance(f"{name}:run")


def test_a_module_that_exits_is_caught(module):
    name = module("import sys\nsys.exit(3)\n", "leaving_commands")
    with pytest.raises(PluginError, match="Typer can build, got exit code 3"):
        check_command_conformance(f"{name}:run")


def test_a_command_is_registered_by_a_string():
    def run() -> None:
        """Say nothing."""

    (result,) = examine_command(run)
    assert "expected a 'module:attr' string" in str(result.problem)
    assert result.problem.endswith("got function")
