"""Every command that docs/results names can be given, and writes what it is listed for."""

import itertools
import re
import shlex
from pathlib import Path

import click
import pytest
from molora_cli.main import app
from typer.main import get_command

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
PAGES = sorted(path for path in RESULTS.rglob("*") if path.suffix in {".md", ".txt"})
_START = r"(?:python bench/|molora )"
_COMMAND = re.compile(rf"`({_START}[^`]+)`|^\$ ({_START}.+)$", re.MULTILINE)
_NEEDED = re.compile(r"add_argument\(\s*\"(--[\w-]+)\"[^)]*required=True")
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def list_commands():
    for page in PAGES:
        for found in _COMMAND.finditer(page.read_text(encoding="utf-8")):
            yield page.relative_to(ROOT).as_posix(), " ".join((found[1] or found[2]).split())


COMMANDS = sorted(set(list_commands()))


def list_options(words):
    """Names of all options of the command that words begin with."""
    if words[0] == "python":
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        return {"--help", *re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", source)}
    command = get_command(app)
    for word in words[1:]:
        if not isinstance(command, click.Group) or word.startswith("--"):
            break
        found = command.get_command(click.Context(command), word)
        if found is None and words[1] == "evolve":
            break  # `molora evolve COOPERATIVE`
        assert found is not None, f"no command '{word}'"
        command = found
    return {name for option in command.params for name in (*option.opts, *option.secondary_opts)}


def test_there_are_commands():
    assert len(COMMANDS) > 20


@pytest.mark.parametrize(("page", "text"), COMMANDS)
def test_a_command_can_be_given(page, text):
    words = shlex.split(text.partition(" # ")[0].partition(" > ")[0])
    options = list_options(words)
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in {"--help", *options}, f"{page}: {text}"
    if words[0] == "python":
        needed = set(_NEEDED.findall((ROOT / words[1]).read_text(encoding="utf-8")))
        assert needed <= set(words), f"{page}: {text} lacks {needed - set(words)}"
    for option, value in itertools.pairwise(words):
        if option == "--out" and value.startswith("docs/"):
            assert (ROOT / value).exists(), f"{page}: {text}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".md"], ids=str)
def test_links_of_a_page_resolve(page):
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_a_json_file_is_written_by_the_command_beside_it():
    rows = (RESULTS / "README.md").read_text(encoding="utf-8").splitlines()
    listed = [row.split("|") for row in rows if row.count("|") == 4 and "`" in row]
    assert listed
    for _, _, files, commands, _ in listed:
        for target in _LINK.findall(files):
            if target.endswith(".json"):
                assert re.search(rf"--out \S*{re.escape(target)}|--out FOLDER", commands), target
