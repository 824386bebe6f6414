"""`molora plugins list`, `show`, `disable`, `enable`, and `molora --plugin FILE`."""

import json
import os
import subprocess
import sys

import pytest
from molora_cli.plugin_show import _USES

from molora_fed.plugins import get_plugins, load_plugins

URL = "Project-URL: Documentation, https://example.org/mine\n"
COMMAND = """
import os
import subprocess
import sys

from molora_fed import hookimpl


@hookimpl
def register_commands(register):
    register("ask-a-child", "asking:ask", summary="Asks", source="own definition")


def ask() -> None:
    \"\"\"Ask a process that this one starts.\"\"\"
    code = "from molora_fed.plugins import load_plugins as l; print(l().found[-1].origin)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=True)
"""


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CONFIG", str(tmp_path / "settings"))
    get_plugins.cache_clear()
    yield tmp_path / "settings" / "plugins.toml"
    get_plugins.cache_clear()


@pytest.fixture
def process(tmp_path):
    """`molora` in a process of its own, for what it leaves in its environment."""

    def call(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "molora_cli.main", *map(str, arguments)],
            cwd=tmp_path, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True,
        )  # fmt: skip

    return call


def read_rows(text):
    return {line.split()[0]: line.split() for line in text.splitlines()[1:]}


def read_fields(text):
    pairs = (line.split("  ", 1) for line in text.splitlines() if line.strip())
    return {label: text.strip() for label, text in pairs}


def test_list_has_a_row_a_plugin_with_what_it_registers(molora, packages):
    packages.add("mine-a", version="2.5")
    packages.add("mine-b", "raise ValueError('boom')")
    listed = molora("plugins", "list")
    assert listed.code == 0
    rows = read_rows(listed.out)
    assert {"core", "cli", "kalavai", "mine-a", "mine-b"} <= rows.keys()
    assert rows["mine-a"] == ["mine-a", "mine-a", "2.5", "enabled", "1", "router"]
    assert rows["mine-b"][:4] == ["mine-b", "mine-b", "0.1.0", "failed"]
    assert "ValueError: boom" in listed.out and "ValueError: boom" in listed.err
    assert "routers, " in listed.out


def test_list_of_a_kind_of_a_plugin_and_of_a_name(molora, packages):
    packages.add("mine-a")
    routers = read_rows(molora("plugins", "list", "--kind", "router").out)
    summary, origin = ["Follows", "mine-a"], ["mine-a", "(mine-a", "0.1.0)"]
    assert routers["mine-a"] == ["mine-a", "router", *summary, *origin]
    assert {row[1] for row in routers.values()} == {"router"}
    for kind in ("routers", "adapter-routers", "Gain_Predictors", "task families"):
        assert molora("plugins", "list", "--kind", kind).code == 0
    assert read_rows(molora("plugins", "list", "--only", "mine-a").out).keys() == {"mine-a"}
    assert read_rows(molora("plugins", "list", "--only", "ties").out).keys() == {"ties"}
    assert "ties" in read_rows(molora("plugins", "list", "--only", "kalavai").out)
    assert molora("plugins", "list", "--only", "kalavai", "--kind", "domain").out.count("\n") == 1
    wrong = molora("plugins", "list", "--kind", "roter")
    assert wrong.code == 61 and "Did you mean 'router'" in wrong.err
    wrong = molora("plugins", "list", "--only", "tyes")
    assert wrong.code == 61 and "'ties'" in wrong.err and "sorting" not in wrong.err


def test_list_as_json(molora, packages):
    packages.add("mine-a")
    found = json.loads(molora("plugins", "list", "--only", "mine-a", "--check", "--json").out)
    assert found == {
        "plugins": [
            {
                "name": "mine-a",
                "origin": "mine-a (mine-a 0.1.0)",
                "distribution": "mine-a",
                "version": "0.1.0",
                "state": "enabled",
                "reason": "",
                "registers": {"router": 1},
            }
        ],
        "registered": [
            {
                "name": "mine-a",
                "kind": "router",
                "summary": "Follows mine-a",
                "source": "own definition",
                "origin": "mine-a (mine-a 0.1.0)",
                "check": "ok",
            }
        ],
    }
    whole = json.loads(molora("plugins", "list", "--json").out)
    assert len(whole["registered"]) > 100 and len(whole["plugins"]) >= 7
    assert "check" not in whole["registered"][0]


def test_check_imports_only_what_is_asked_for(molora, packages):
    packages.add("mine-a", work="import nothing_of_this_name\n")
    packages.add("mine-b")
    packages.add("mine-c", "raise ValueError('boom')")
    assert molora("plugins", "list", "--only", "mine-b", "--check").code == 0
    assert "mine_a.work" not in sys.modules and "mine_b.work" in sys.modules
    wrong = molora("plugins", "list", "--only", "mine-a", "--check")
    assert wrong.code == 60 and read_rows(wrong.out)["mine-a"][-1] == "FAILED"
    assert "nothing_of_this_name" in wrong.err.splitlines()[-1]
    assert "boom" not in wrong.err.splitlines()[-1]
    wrong = molora("plugins", "list", "--only", "mine-c", "--check")
    assert wrong.code == 60 and "boom" in wrong.err.splitlines()[-1]


def test_show_says_all_of_a_router(molora, packages):
    packages.add("mine-a", metadata=URL)
    shown = molora("plugins", "show", "mine-a")
    assert shown.code == 0
    plugin, router = map(read_fields, shown.out.split("\n\n"))
    assert plugin == {
        "plugin": "mine-a (mine-a 0.1.0)",
        "state": "enabled",
        "routers": "mine-a",
        "docs": "https://example.org/mine",
        "check": "molora plugins check mine-a",
    }
    assert router == {
        "router": "mine-a",
        "summary": "Follows mine-a",
        "source": "own definition",
        "origin": "mine-a (mine-a 0.1.0)",
        "docs": "https://example.org/mine",
        "option sharpness": "float, default 1.0. How sharply to follow the evidence.",
        "charter": '[amendment.fusion] router = "mine-a"',
        "command": "molora coop amend COOPERATIVE --set fusion.router=mine-a",
        "check": "molora plugins check mine-a",
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("delta", "--kind delta"),
        ("death", """--set 'population.lifecycle=[{name = "death"}]'"""),
        ("death", "int, >= 1, default 2. Generations in a row"),
        ("evidence-mixed", "tuple[float, ...], default (1.0, "),
        ("near-copy", "always runs"),
        ("python", "--domain python"),
        ("average", "fusion.merges=average"),
        ("strings", "--families strings"),
        ("study", "molora study --help"),
    ],
)
def test_show_says_how_each_kind_is_used(molora, name, expected):
    assert expected in molora("plugins", "show", name).out


def test_show_of_what_cannot_be_imported_or_is_not_there(molora, packages):
    packages.add("mine-a", work="import nothing_of_this_name\n")
    shown = molora("plugins", "show", "mine-a")
    assert shown.code == 0 and "failed" in shown.out and "nothing_of_this_name" in shown.out
    wrong = molora("plugins", "show", "mine-x")
    assert wrong.code == 61 and "Did you mean 'mine-a'" in wrong.err


def test_a_disabled_plugin_is_out_until_it_is_enabled(molora, packages, settings):
    packages.add("mine-a")
    done = molora("plugins", "disable", "mine-a")
    assert done.code == 0 and f"kept in      {settings}" in done.out
    packages.refresh()
    assert read_rows(molora("plugins", "list").out)["mine-a"][3] == "disabled"
    assert "disabled already" in molora("plugins", "disable", "mine-a").out
    assert "state   disabled: enable it with" in molora("plugins", "show", "mine-a").out
    assert molora("plugins", "enable", "mine-a").code == 0
    packages.refresh()
    assert read_rows(molora("plugins", "list").out)["mine-a"][3] == "enabled"
    assert "is not disabled" in molora("plugins", "enable", "mine-a").out


def test_a_command_of_a_disabled_plugin_says_which_one(molora):
    assert molora("plugins", "disable", "studies").code == 0
    get_plugins.cache_clear()
    wrong = molora("study", "--list")
    assert wrong.code == 2
    words = " ".join(wrong.err.replace("│", " ").split())
    assert "registered by the disabled plugin studies: enable it with" in words


def test_what_cannot_be_disabled(molora, monkeypatch, settings):
    for name in ("core", "cli"):
        wrong = molora("plugins", "disable", name)
        assert wrong.code == 60 and "molora can do without" in wrong.err
    wrong = molora("plugins", "disable", "kalavay")
    assert wrong.code == 61 and "Did you mean 'kalavai'" in wrong.err
    assert not settings.exists()
    monkeypatch.setenv("MOLORA_LOAD_PLUGINS", "kalavai")
    done = molora("plugins", "disable", "kalavai")
    assert "MOLORA_LOAD_PLUGINS is set: it alone decides" in done.err


def test_a_file_is_loaded_for_every_command_and_by_processes_it_starts(process, tmp_path):
    (tmp_path / "asking.py").write_text(COMMAND)
    asked = process("--plugin", "asking.py", "ask-a-child")
    assert (asked.returncode, asked.stdout) == (0, "asking.py (file)\n"), asked.stderr
    assert "ask-a-child" in process("--plugin", "asking.py", "--help").stdout
    assert process("ask-a-child").returncode == 2


def test_a_file_that_fails_ends_the_command_in_one_line(process, tmp_path):
    (tmp_path / "asking.py").write_text("1 / 0")
    for given, code, expected in (
        ("asking.py", 60, "ZeroDivisionError: division by zero, at asking.py:1. Correct it."),
        ("none.py", 60, "expected a file, got nothing there. Check the path."),
    ):
        done = process("--plugin", given, "plugins", "list")
        assert done.returncode == code and done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: Cannot load the plugin") and line.endswith(expected)


def test_amend_pins_and_says_so(molora, packages, tiny_checkpoint, tmp_path):
    packages.add("mine-a")
    coop = tmp_path / "coop"
    made = molora(
        "coop", "create", "tiny", "--base", tiny_checkpoint(), "--folder", coop,
        "--router", "mine-a", "--block-size", "32",
    )  # fmt: skip
    assert made.code == 0, made.err
    (pinned,) = [line for line in made.out.splitlines() if line.startswith("pinned")]
    assert pinned.startswith("pinned       mine-a 0.1.0, hash ")
    packages.upgrade("mine-a", "0.2.0")
    refused = molora("coop", "amend", coop, "--set", "training.steps=9")
    assert refused.code == 60 and "with --pin" in refused.err
    train = molora(
        "train", "--cooperative", coop, "--domain", "a", "--out", tmp_path / "t", "--data", coop
    )
    assert train.code == 60
    assert "expected the plugin mine-a 0.1.0, got 0.2.0" in train.err
    amended = molora("coop", "amend", coop, "--pin")
    assert amended.code == 0 and "Amendment 1" in amended.out
    assert "mine-a 0.1.0 (" in amended.out and "mine-a 0.2.0 (" in amended.out
    neither = molora("coop", "amend", coop)
    assert neither.code == 10 and "--set KEY=VALUE or --pin" in neither.err


def test_every_hook_has_a_line_that_uses_what_it_registers():
    assert _USES.keys() == load_plugins().registries().keys()
