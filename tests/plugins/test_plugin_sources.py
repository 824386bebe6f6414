"""Which plugins load: hooks of other versions, disabled ones, and plugins of one file."""

import os
import sys
import types

import pytest

from molora_fed import hookimpl
from molora_fed.errors import ConfigError, PluginError, UnknownNameError
from molora_fed.plugins import load_plugins
from molora_fed.storage.plugin_sources import (
    DisabledPlugin,
    list_plugin_files,
    read_disabled,
    write_disabled,
)

FILE = """
from molora_fed import hookimpl


def predict(case, past):
    return None


@hookimpl
def register_gain_predictors(register):
    register("of-a-file", "{stem}:predict", summary="A test entry", source="own definition")
"""


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CONFIG", str(tmp_path / "settings"))
    return tmp_path / "settings"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A one-file plugin that `MOLORA_PLUGINS` names beside those written before."""
    stems = []

    def add(stem, source=FILE, folder="."):
        path = tmp_path / folder / f"{stem}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source.replace("{stem}", stem))
        given = [*filter(None, [os.environ.get("MOLORA_PLUGINS")]), str(path)]
        monkeypatch.setenv("MOLORA_PLUGINS", os.pathsep.join(given))
        stems.append(stem)
        return path

    yield add
    for stem in stems:
        module = sys.modules.get(stem)
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[stem]


def build_module(**functions):
    module = types.ModuleType("stranger")
    for name, function in functions.items():
        setattr(module, name, function)
    return module


def build_hook():
    """A function of its own each time: marking one changes it."""

    def register_one(register):
        register("mine", predict, summary="A test entry", source="own definition")

    return register_one


def predict(case, past):
    return None


# Hooks --------------------------------------------------------------------------------------------


def test_a_misspelled_hook_is_told_near_ones():
    module = build_module(register_router=hookimpl(build_hook()))
    with pytest.raises(PluginError) as caught:
        load_plugins(extra=[("stranger 1.0", module)])
    message = str(caught.value)
    assert "unknown hook 'register_router': expected one such as register_routers" in message
    assert "optionalhook=True" in message and "\n" not in message


def test_one_plugin_serves_two_versions_of_the_core():
    """A hook that only another version has is left alone where it is marked optional."""
    optional = hookimpl(optionalhook=True)
    module = build_module(
        register_dreams=optional(build_hook()),
        register_gain_predictors=hookimpl(build_hook()),
    )
    plugins = load_plugins(extra=[("stranger 1.0", module)])
    assert plugins.gain_predictors.resolve("mine") is predict
    module.register_visions = hookimpl(build_hook())
    with pytest.raises(PluginError, match="unknown hook 'register_visions'"):
        load_plugins(extra=[("stranger 1.0", module)])


@pytest.mark.parametrize(
    ("functions", "got"),
    [({}, "got none"), ({"register_routers": build_hook()}, "got register_routers without it")],
)
def test_a_module_without_a_marked_hook_is_a_failure(functions, got):
    with pytest.raises(PluginError, match=f"expected a function with @hookimpl.*{got}"):
        load_plugins(extra=[("stranger 1.0", build_module(**functions))])


# Disabled plugins ---------------------------------------------------------------------------------


def test_a_disabled_plugin_is_left_out_and_named_by_the_error_of_its_names(
    settings, packages, monkeypatch
):
    packages.add("mine-a")
    assert "mine-a" in load_plugins().routers.names()
    write_disabled({"mine-a": DisabledPlugin("mine-a (mine-a 0.1.0)", {"router": ("mine-a",)})})
    plugins = load_plugins()
    assert "mine-a" not in plugins.routers.names()
    (one,) = [one for one in plugins.found if one.name == "mine-a"]
    assert (one.state, one.distribution, one.version) == ("disabled", "mine-a", "0.1.0")
    with pytest.raises(UnknownNameError) as caught:
        plugins.routers.resolve("mine-a")
    assert "registered by the disabled plugin mine-a: enable it with" in str(caught.value)
    with pytest.raises(UnknownNameError) as caught:
        plugins.merges.resolve("mine-a")
    assert "disabled" not in str(caught.value)

    monkeypatch.setenv("MOLORA_LOAD_PLUGINS", "mine-a")
    assert load_plugins().routers.names() == ["mine-a"]
    monkeypatch.setenv("MOLORA_LOAD_PLUGINS", "")
    with pytest.raises(UnknownNameError) as caught:
        load_plugins().routers.resolve("mine-a")
    assert "disabled" not in str(caught.value)


def test_built_in_plugins_load_whatever_is_disabled(settings):
    write_disabled({name: DisabledPlugin(name) for name in ("core", "cli", "kalavai")})
    plugins = load_plugins()
    assert "python" in plugins.domains.names() and "fuse" in plugins.commands.names()
    assert plugins.routers.names() == []


def test_what_is_disabled_is_kept_as_it_was_written(settings):
    assert read_disabled() == {}
    disabled = {"b": DisabledPlugin("b (b 1)"), "a": DisabledPlugin("a", {"merge": ("x", "y")})}
    path = write_disabled(disabled)
    assert path == settings / "plugins.toml" and read_disabled() == disabled
    for wrong in ("disabled = 3", "[disabled.a]\n", "\0", "[disabled.a]\norigin=1\nregisters=2"):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match=r"plugins\.toml.*Correct or delete"):
            load_plugins()


# One file -----------------------------------------------------------------------------------------


def test_a_plugin_of_one_file_registers_and_resolves(write):
    write("of_one_file")
    plugins = load_plugins()
    entry = plugins.gain_predictors.entry("of-a-file")
    assert entry.origin == "of_one_file.py (file)" and entry.is_file and not entry.is_own
    assert plugins.gain_predictors.resolve("of-a-file")(None, ()) is None
    assert plugins.found[-1].state == "enabled" and plugins.found[-1].distribution == ""
    again = load_plugins().gain_predictors
    assert again.resolve("of-a-file") is plugins.gain_predictors.resolve("of-a-file")


def test_a_file_named_twice_is_loaded_once(write):
    path = write("of_one_file")
    write("of_one_file")
    assert [file.path for file in list_plugin_files()] == [path]


@pytest.mark.parametrize(
    ("stem", "source", "reason"),
    [
        ("raises", "import os\nraise ValueError('bad\\nluck')", "ValueError: bad luck, at raises"),
        ("malformed", "def (:", "SyntaxError: invalid syntax"),
        ("leaves", "import sys; sys.exit(3)", "SystemExit: 3"),
        ("json", FILE, "expected a name that no module has, got that of json"),
        ("not-a-name", FILE, "expected a file named like a module"),
        ("empty", "", "expected a function with @hookimpl"),
        ("taken", FILE.replace("of-a-file", "own-loss"), "the name is taken by kalavai"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_one_line(write, stem, source, reason):
    write(stem, source)
    with pytest.raises(PluginError) as caught:
        load_plugins()
    message = str(caught.value)
    assert reason in message and f"{stem}.py" in message and "\n" not in message
    assert "uninstall" not in message and "LOAD_PLUGINS" not in message.rpartition(". ")[2]


def test_folders_and_missing_files_are_refused_with_advice(tmp_path, monkeypatch, write):
    (tmp_path / "package").mkdir()
    for given, expected in (
        (tmp_path / "package", "got a folder. Name the file that has the hooks"),
        (tmp_path / "none.py", "got nothing there. Check the path"),
    ):
        monkeypatch.setenv("MOLORA_PLUGINS", str(given))
        with pytest.raises(PluginError, match=expected):
            load_plugins()
    (tmp_path / "package" / "pyproject.toml").write_text("")
    monkeypatch.setenv("MOLORA_PLUGINS", str(tmp_path / "package"))
    with pytest.raises(PluginError, match="Install the package with `pip install -e"):
        load_plugins()
    monkeypatch.setenv("MOLORA_PLUGINS", "")
    write("of_one_file")
    write("of_one_file", folder="other")
    with pytest.raises(PluginError, match="expected files of different names"):
        load_plugins()
