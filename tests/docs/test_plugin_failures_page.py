"""docs/plugin_failures.md: its example loads, its variables and the lines it explains are real."""

import re
import types
from pathlib import Path

from molora_cli.plugins import app
from typer.main import get_group

from molora_fed.plugins import load_plugins

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "plugin_failures.md").read_text()
SOURCES = "".join(
    path.read_text() for folder in ("molora_fed", "cli") for path in (ROOT / folder).rglob("*.py")
)


def test_the_example_serves_this_version_too():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    module = types.ModuleType("page")
    exec(compile(code, "plugin_failures.md", "exec"), module.__dict__)
    plugins = load_plugins(extra=[("page 1.0", module)])
    assert plugins.gain_predictors.entry("floor").origin == "page 1.0"


def test_every_variable_is_read_somewhere():
    named = set(re.findall(r"MOLORA_[A-Z_]+", PAGE))
    assert named == {
        f"MOLORA_{end}" for end in ["DEBUG", "TRACE_HOOKS", "LOAD_PLUGINS", "PLUGINS", "CONFIG"]
    }
    assert all(f'"{name}"' in SOURCES for name in named)


def test_every_verb_and_option_that_is_named_is_there():
    commands = get_group(app).commands
    for verb, rest in re.findall(r"`molora plugins\s(\w+)([^`]*)`", PAGE):
        if verb == "check":  # registered by a module of its own
            continue
        options = {option for each in commands[verb].params for option in each.opts}
        assert set(re.findall(r"--\w+", rest)) <= options


def test_what_each_line_begins_with_is_said_by_the_code():
    (table,) = re.findall(r"## What the lines mean\n\n(.*?)\n\n", PAGE, flags=re.DOTALL)
    said = " ".join(SOURCES.replace('"\n', "").split())
    for fragment in (
        "Cannot load plugin",
        "expected a function with @hookimpl",
        "unknown hook",
        "the name is taken by",
        "Cannot use",
        "Unknown",
        "failed in",
        "Cannot load the plugin",
        "Cannot use charter",
        "other files with",
        "of plugins without a pin",
        "Pin what is installed here with --pin",
    ):
        assert fragment in table and fragment in said
