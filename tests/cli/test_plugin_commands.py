"""Commands of plugins: real small distributions in temporary folders, `molora` in a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from molora_cli.commands import OWN
from molora_cli.main import build_command

from molora_fed.plugins import load_plugins

HOOK = '''
from molora_fed import hookimpl


@hookimpl
def register_commands(register):
    """Registers commands."""
    for name, target in {commands!r}.items():
        register(name, target, summary=f"Does {{name}}", source="own definition")
'''

WORK = '''
import sys

import typer

print("HEAVY TARGET IMPORTED", file=sys.stderr)
app = typer.Typer()


def count(number: int, twice: bool = False) -> None:
    """Count to a number."""
    print(*range(number * (2 if twice else 1)))


@app.command()
def up() -> None:
    """Go up."""
    print("went up")


@app.command()
def down() -> None:
    """Go down."""


def strange(thing: complex) -> None:
    """Typer knows no complex numbers."""
'''


@pytest.fixture
def molora(tmp_path):
    """`molora("count", "3")` with the distributions that `install` made."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "molora_cli.main", *arguments],
            env={**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"},
            capture_output=True,
            text=True,
        )

    return call


@pytest.fixture
def install(tmp_path):
    """Make a distribution whose plugin registers these commands, and one module of work."""

    def make(name: str, commands: dict[str, str], source: str = "") -> None:
        (tmp_path / f"{name}.py").write_text(source or HOOK.format(commands=commands))
        (tmp_path / f"{name}_work.py").write_text(WORK)
        metadata: Path = tmp_path / f"{name}-2.5.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.5\n")
        (metadata / "entry_points.txt").write_text(f"[molora_fed]\n{name} = {name}\n")

    return make


def test_a_command_is_listed_by_its_summary_and_imported_only_when_invoked(install, molora):
    install("strange", {"count": "strange_work:count", "lift": "strange_work:app"})
    shown = molora("--help")
    assert shown.returncode == 0 and shown.stderr == ""
    listed = shown.stdout.partition("Researcher and plugin author:\n")[2].splitlines()
    assert ["count", "Does", "count"] in [line.split() for line in listed]
    assert ["lift", "Does", "lift"] in [line.split() for line in listed]
    done = molora("count", "2", "--twice")
    assert (done.returncode, done.stdout) == (0, "0 1 2 3\n")
    assert "HEAVY TARGET IMPORTED" in done.stderr
    assert molora("lift", "up").stdout == "went up\n"
    assert "Go down." in molora("lift", "--help").stdout
    assert "Count to a number." in molora("count", "--help").stdout
    assert molora("count", "x").returncode == 2


def test_a_clash_with_a_built_in_command_is_refused_with_both_origins(install, molora):
    install("rival", {"harmless": "rival_work:count", "fuse": "rival_work:count"})
    shown = molora("--help")
    assert shown.returncode == 0
    words = " ".join(shown.stdout.split())
    assert (
        "Plugins left out: Cannot load plugin rival (rival 2.5): Cannot register command 'fuse' of "
        "rival (rival 2.5): the name is taken by cli (molora-fed 0.1.0)."
    ) in words
    assert "Does harmless" not in shown.stdout
    assert "Admit contributions" in molora("fuse", "--help").stdout
    unknown = molora("harmless", "3")
    assert unknown.returncode == 2
    assert "No such command 'harmless'." in unknown.stderr
    assert "Cannot load plugin rival (rival 2.5)" in " ".join(unknown.stderr.split())


def test_of_two_plugins_with_one_command_the_later_is_left_out_whole(install, molora):
    install("first", {"count": "first_work:count"})
    install("second", {"count": "second_work:count", "other": "second_work:count"})
    shown = " ".join(molora("--help").stdout.split())
    assert "command 'count' of second (second 2.5): the name is taken by first (first 2.5)" in shown
    assert "Does count" in shown and "Does other" not in shown
    assert molora("count", "1").stdout == "0\n"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('boom')", "importing 'broken' failed with RuntimeError: boom"),
        (HOOK.format(commands={"x": ""}), "expected an object or a 'module:attr' string"),
        (HOOK.format(commands={"X": "a:b"}), "expected a name of lower-case words"),
        (HOOK.format(commands={}).replace("register_commands", "register_comands"), "comands"),
    ],
)
def test_a_plugin_that_fails_is_named_and_breaks_no_help(install, molora, source, reason):
    install("broken", {}, source)
    shown = molora("--help")
    words = " ".join(shown.stdout.split())
    assert shown.returncode == 0 and shown.stderr == ""
    assert "Plugins left out: Cannot load plugin broken (broken 2.5)" in words and reason in words
    assert molora("plugins", "list").returncode == 0


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("late_work:missing", "importing 'late_work:missing' failed with AttributeError"),
        ("late_work:sys", "expected a callable, got module"),
        ("late_work:strange", "expected a Typer app or a function that Typer can call"),
    ],
)
def test_a_target_that_cannot_be_used_is_one_line_of_its_command_only(
    install, molora, target, reason
):
    install("late", {"bad": target})
    assert molora("--help").returncode == 0
    done = molora("bad")
    assert done.returncode == 60
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: Cannot use command 'bad' of late (late 2.5): ")
    assert reason in error
    assert molora("plugins", "list").returncode == 0


def test_near_names_are_proposed(molora):
    assert "No such command 'fus'. Did you mean 'fuse'?" in molora("fus").stderr


def test_hook_register_commands_carries_the_own_commands_too():
    commands = load_plugins().commands
    for name, _, summary in OWN:
        entry = commands.entry(name)
        assert entry.origin.startswith("cli (molora-fed ") and entry.summary == summary
        assert build_command(name, commands.resolve(name)).help


def test_a_built_in_command_needs_no_permission_to_load(monkeypatch):
    monkeypatch.setenv("MOLORA_LOAD_PLUGINS", "")
    assert {name for name, _, _ in OWN} <= set(load_plugins().commands.names())


def test_a_typer_app_of_one_command_stays_a_group():
    app = typer.Typer()

    @app.command()
    def only() -> None:
        print("only")

    assert build_command("single", app).name == "single"
