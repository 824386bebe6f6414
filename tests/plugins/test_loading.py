"""Plugins load whole or not at all, clashes name both origins, and order never matters."""

import abc
import itertools
import subprocess
import sys
import types

import pytest
from pydantic import BaseModel

from molora_fed import Configurable, PluginOptions, hookimpl
from molora_fed.errors import ConfigError, PluginError, UnknownNameError
from molora_fed.plugins import load_plugins
from molora_fed.storage.options import open_callable


def build_plugin(**registrations):
    """A plugin object; each keyword is a hook suffix with a list of (name, target)."""
    module = types.ModuleType("stranger")
    for suffix, entries in registrations.items():

        def implementation(register, entries=tuple(entries)):
            for name, target in entries:
                register(name, target, summary="A test entry", source="own definition")

        setattr(module, f"register_{suffix}", hookimpl(implementation))
    return module


def predict_nothing(case, past):
    return None


def test_first_party_plugins_load_and_resolve():
    plugins = load_plugins()
    assert plugins.failures == []
    assert {"linear", "linear-noncausal", "evidence", "evidence-zero"} <= set(
        plugins.routers.names()
    )
    assert {"kalavai-law", "own-loss", "own-loss-bracket"} <= set(plugins.gain_predictors.names())
    assert {"lora", "svd", "delta"} <= set(plugins.adapter_kinds.names())
    for registry in plugins.registries().values():
        for entry in registry:
            registry.resolve(entry.name)


def test_a_stranger_registers_through_the_same_hooks():
    plugin = build_plugin(gain_predictors=[("mine", predict_nothing)])
    plugins = load_plugins(extra=[("stranger 1.0", plugin)])
    assert plugins.gain_predictors.resolve("mine") is predict_nothing
    assert plugins.gain_predictors.entry("mine").origin == "stranger 1.0"


def test_misspelled_hook_is_refused_and_named():
    plugin = build_plugin(rooters=[("mine", predict_nothing)])
    with pytest.raises(PluginError, match=r"stranger 1\.0.*register_rooters"):
        load_plugins(extra=[("stranger 1.0", plugin)])


def test_wrong_hook_argument_is_refused_and_named():
    module = types.ModuleType("stranger")
    module.register_routers = hookimpl(lambda registrar: None)
    with pytest.raises(PluginError, match=r"stranger 1\.0.*registrar"):
        load_plugins(extra=[("stranger 1.0", module)])


def test_clash_names_both_origins():
    plugin = build_plugin(gain_predictors=[("own-loss", predict_nothing)])
    with pytest.raises(PluginError, match=r"'own-loss' of stranger 1\.0.*kalavai \(molora-fed"):
        load_plugins(extra=[("stranger 1.0", plugin)])


@pytest.mark.parametrize("name", ["Upper", "under_score", "", "two--dashes", "-front", 7])
def test_malformed_name_is_refused(name):
    plugin = build_plugin(gain_predictors=[(name, predict_nothing)])
    with pytest.raises(PluginError, match="lower-case words joined by dashes"):
        load_plugins(extra=[("stranger 1.0", plugin)])


@pytest.mark.parametrize("target", [None, "no-colon", "a:b:c", ":attr", "module:"])
def test_malformed_target_is_refused(target):
    plugin = build_plugin(gain_predictors=[("mine", target)])
    with pytest.raises(PluginError, match="'module:attr'"):
        load_plugins(extra=[("stranger 1.0", plugin)])


def test_a_failing_plugin_leaves_nothing_behind(monkeypatch):
    """The first hook succeeds, the second raises: neither may remain."""
    module = types.ModuleType("stranger")

    def register_gain_predictors(register):
        register("mine", predict_nothing, summary="A test entry", source="own definition")

    def register_routers(register):
        raise RuntimeError("boom")

    module.register_gain_predictors = hookimpl(register_gain_predictors)
    module.register_routers = hookimpl(register_routers)

    class Distribution:
        name, version = "stranger", "1.0"

    class Point:
        name, value, dist = "stranger", "stranger", Distribution

        @staticmethod
        def load():
            return module

    from molora_fed import plugins as loader

    installed = loader.entry_points(group=loader.GROUP)
    monkeypatch.setattr(loader, "entry_points", lambda group: [*installed, Point])
    plugins = load_plugins()
    assert [str(failure) for failure in plugins.failures] == [
        "Cannot load plugin stranger (stranger 1.0): boom. Correct or uninstall it, or leave it "
        "out with MOLORA_LOAD_PLUGINS."
    ]
    assert "mine" not in plugins.gain_predictors.names()
    assert "linear" in plugins.routers.names()


def test_import_failure_is_named_on_first_use_only():
    plugin = build_plugin(routers=[("broken", "molora_no_such_module:Router")])
    plugins = load_plugins(extra=[("stranger 1.0", plugin)])
    with pytest.raises(PluginError, match=r"router 'broken' of stranger 1\.0.*ModuleNotFoundError"):
        plugins.routers.resolve("broken")


def test_contract_is_checked_on_first_use():
    plugin = build_plugin(routers=[("hollow", "collections:OrderedDict")])
    plugins = load_plugins(extra=[("stranger 1.0", plugin)])
    with pytest.raises(PluginError, match=r"router 'hollow' of stranger 1\.0.*fit"):
        plugins.routers.resolve("hollow")


class Shift(PluginOptions):
    by: float = 1.0


class Shifted(Configurable[Shift]):
    def __call__(self, case, past):
        return self.options.by


class Begun(Shifted, abc.ABC):
    @abc.abstractmethod
    def more(self):
        """Nobody says what."""


class Loose(BaseModel):
    by: float = 1.0


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        (Shifted, ""),
        (predict_nothing, ""),
        (type("Other", (Shifted,), {"name": "other"}), "expected the class attribute name"),
        (type("Plain", (Configurable,), {}), "instances can be called"),
        (type("Loose", (Shifted,), {"Options": Loose}), "refuse unknown keys"),
        (type("Bare", (), {"__call__": predict_nothing}), "a pydantic model as attribute"),
        (Begun, "abstract methods"),
    ],
)
def test_what_is_called_is_a_function_or_a_class_with_options(target, problem):
    plugins = load_plugins([("stranger 1.0", build_plugin(gain_predictors=[("mine", target)]))])
    if not problem:
        assert plugins.gain_predictors.resolve("mine") is target
    else:
        with pytest.raises(PluginError, match=problem):
            plugins.gain_predictors.resolve("mine")


def test_a_callable_is_made_with_its_options_under_the_guard():
    def fail(self, options):
        raise RuntimeError("no")

    failing = type("Failing", (Shifted,), {"__init__": fail})
    entries = [("mine", Shifted), ("plain", predict_nothing), ("failing", failing)]
    registry = load_plugins([("stranger 1.0", build_plugin(gain_predictors=entries))])
    registry = registry.gain_predictors
    assert open_callable(registry, "mine")(None, ()) == 1.0
    assert open_callable(registry, "mine", {"by": 2.0})(None, ()) == 2.0
    assert open_callable(registry, "plain") is predict_nothing
    for name in ("mine", "plain"):
        with pytest.raises(ConfigError, match=f"gain predictor '{name}'.*bi: Extra.* Mend it"):
            open_callable(registry, name, {"bi": 2.0}, error=ConfigError, fix="Mend it.")
    with pytest.raises(PluginError, match=r"'failing' of stranger 1\.0 failed in construction"):
        open_callable(registry, "failing")


def test_unknown_name_lists_near_and_all_names():
    with pytest.raises(UnknownNameError) as caught:
        load_plugins().routers.resolve("evidense")
    assert "Did you mean 'evidence'" in str(caught.value)
    assert "linear-noncausal" in str(caught.value)
    assert caught.value.exit_code == 61


def test_registration_ends_after_loading():
    kept = []
    module = types.ModuleType("stranger")
    module.register_routers = hookimpl(lambda register: kept.append(register))
    load_plugins(extra=[("stranger 1.0", module)])
    with pytest.raises(PluginError, match="registration has ended"):
        kept[0]("late", predict_nothing, summary="Too late", source="own definition")


def test_order_of_plugins_never_matters():
    extras = [
        (f"stranger-{i} 1.0", build_plugin(gain_predictors=[(f"mine-{i}", predict_nothing)]))
        for i in range(3)
    ]
    seen = {
        tuple(load_plugins(extra=order).gain_predictors.names())
        for order in itertools.permutations(extras)
    }
    assert len(seen) == 1


def test_load_plugins_can_be_restricted(monkeypatch):
    monkeypatch.setenv("MOLORA_LOAD_PLUGINS", "")
    plugins = load_plugins()
    assert plugins.routers.names() == []
    assert "python" in plugins.domains.names()


def test_importing_the_package_and_its_plugins_is_light():
    code = (
        "import sys; from molora_fed.plugins import load_plugins; load_plugins(); "
        "heavy = {'torch', 'transformers', 'flwr', 'numpy'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# One test per hook: a stranger's registration arrives under its name. ------------------------


@pytest.mark.parametrize(
    "suffix",
    [
        "routers",
        "gain_predictors",
        "admission_checks",
        "domains",
        "adapter_kinds",
        "commands",
        "carried_files",
    ],
)
def test_hook_reaches_its_registry(suffix):
    plugin = build_plugin(**{suffix: [("mine", "molora_no_such_module:thing")]})
    plugins = load_plugins(extra=[("stranger 1.0", plugin)])
    assert "mine" in plugins.registries()[suffix].names()


@pytest.fixture
def install(monkeypatch):
    """Entry points of a stranger's distribution beside the installed ones."""
    from molora_fed import plugins as loader

    installed = loader.entry_points(group=loader.GROUP)

    def add(name, module, value="stranger"):
        distribution = types.SimpleNamespace(name="stranger", version="1.0")
        point = types.SimpleNamespace(
            name=name, value=value, dist=distribution, load=lambda: module
        )
        monkeypatch.setattr(loader, "entry_points", lambda group: [point, *installed])

    return add


@pytest.mark.parametrize("name", ["aaa", "zzz"])
def test_a_newcomer_never_takes_the_place_of_a_first_party_plugin(install, name):
    install(name, build_plugin(routers=[("evidence", "stranger:Router"), ("other", "a:b")]))
    plugins = load_plugins()
    assert plugins.routers.entry("evidence").distribution == "molora-fed"
    assert "other" not in plugins.routers.names()
    [failure] = plugins.failures
    assert f"router 'evidence' of {name} (stranger 1.0): the name is taken by kalavai" in str(
        failure
    )
    with pytest.raises(UnknownNameError, match=r"failed to load: Cannot load plugin .*stranger"):
        plugins.routers.resolve("other")


def test_a_stranger_cannot_pass_for_a_built_in_plugin(install, monkeypatch):
    from molora_fed import builtin

    install("mine", builtin, value="molora_fed.builtin")
    plugins = load_plugins()
    assert plugins.domains.entry("python").is_own
    assert "mine (stranger 1.0)" in str(plugins.failures[0])


def test_an_entry_says_who_it_is_from():
    entry = load_plugins().routers.entry("evidence")
    described = entry.describe()
    assert (described["name"], described["plugin"]) == ("evidence", "molora-fed")
    assert described["version"] and entry.title.startswith(
        "Router 'evidence' of kalavai (molora-fed"
    )
