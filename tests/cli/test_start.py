"""The command starts fast, because no verb imports anything heavy before it runs."""

import resource
import subprocess
import sys

import click
import pytest
from molora_cli.commands import GROUPS
from molora_cli.main import app, run
from typer.main import get_command

HEAVY = ("torch", "transformers", "flwr", "numpy", "peft", "accelerate", "matplotlib", "grpc")
VERBS = ("demo", "coop", "serve", "join", "train", "fuse", "evaluate", "generate", "report")

_PROBE = f"""
import sys
from molora_cli.main import run
code = run(sys.argv[1:])
loaded = [name for name in {HEAVY!r} if name in sys.modules]
print("LOADED", code, *loaded)
"""


def probe(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_help_with_all_plugins_loads_nothing_heavy():
    lines = probe("--help")
    assert lines[-1] == "LOADED 0"
    assert all(any(line.split()[:1] == [verb] for line in lines) for verb in (*VERBS, "plugins"))


def test_plugins_list_loads_nothing_heavy():
    for arguments, row in (((), "kalavai "), (("--kind", "router"), "evidence ")):
        lines = probe("plugins", "list", *arguments)
        assert lines[-1] == "LOADED 0"
        assert any(line.startswith(row) for line in lines)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_loads_nothing_heavy(verb):
    assert probe(verb, "--help")[-1] == "LOADED 0"


def test_help_takes_under_half_a_second():
    """Of the processor: how long a busy machine lets it wait is no business of the command's."""
    used = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "molora_cli.main", "--help"], check=True, capture_output=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(used) < 0.5


def list_commands(command, path=()):
    """Every command and subcommand, as words after `molora`."""
    yield path
    names = command.list_commands(click.Context(command)) if hasattr(command, "commands") else ()
    for name in names:
        yield from list_commands(command.get_command(click.Context(command), name), (*path, name))


def test_help_is_grouped_by_who_uses_a_command():
    lines = probe("--help")
    titles = [line.rstrip(":") for line in lines if line.endswith(":") and line[0] != " "]
    assert titles == ["Options", *GROUPS]
    assert lines.index("Researcher and plugin author:") < next(
        index for index, line in enumerate(lines) if line.split()[:1] == ["study"]
    )


def test_help_of_every_command_is_plain_text(capsys):
    found = list(list_commands(get_command(app)))
    assert ("coop", "create") in found and ("study",) in found
    for path in found:
        assert run([*path, "--help"]) == 0
    text = capsys.readouterr().out
    assert "[required]" in text and "[default: " in text
    assert "\\" not in text
