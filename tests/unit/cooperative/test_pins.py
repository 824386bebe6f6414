"""Pins of third-party plugins, on real small distributions and a cooperative that is fused."""

import pytest
from growing_helpers import contribute, found
from plugin_packages import WORK

from molora_fed.charter import (
    Amendment,
    Charter,
    PluginPin,
    load_charter,
    parse_charter,
    write_charter,
)
from molora_fed.contributions.ledger import Ledger
from molora_fed.cooperative.admit import admit_contributions
from molora_fed.cooperative.amend import amend_by_settings
from molora_fed.cooperative.contribute import check_choices
from molora_fed.cooperative.cooperative import CharterAndBase, open_cooperative
from molora_fed.cooperative.fuse import fuse_contributions
from molora_fed.cooperative.pins import build_pins, check_pins
from molora_fed.errors import CharterError, PluginError, UnknownNameError
from molora_fed.federation.coordinator import CoordinatorWorker
from molora_fed.federation.homes import CoordinatorHome
from molora_fed.models.base import load_base
from molora_fed.plugins import load_plugins
from molora_fed.storage.distributions import find_installed
from molora_fed.storage.files import canonical_json
from molora_fed.storage.options import name_choices

OTHER = WORK.replace("SHARPNESS = 1.0", "SHARPNESS = 2.0")
PREDICTOR = """
from molora_fed import hookimpl


@hookimpl
def register_gain_predictors(register):
    register("{name}", "{module}.work:predict", summary="None", source="own definition")
"""


@pytest.fixture
def base(tiny_checkpoint):
    return load_base(tiny_checkpoint())


@pytest.fixture
def cooperative(tmp_path, packages, base):
    """Its router is that of a third-party distribution."""
    packages.add("mine-a")
    return found(tmp_path / "home", base, router="mine-a", compare=("evidence",))


def refuse(cooperative):
    with pytest.raises(PluginError) as caught:
        check_pins(cooperative.charter, load_plugins())
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_founded_cooperative_pins_what_it_names_of_others(cooperative, packages):
    (pin,) = cooperative.charter.amendment.plugins
    assert (pin.name, pin.version) == ("mine-a", "0.1.0")
    assert pin.hash == find_installed("mine-a").hash()
    assert open_cooperative(cooperative.folder).charter == cooperative.charter
    text = (cooperative.folder / "cooperative.toml").read_text()
    assert "[[amendment.plugins]]" in text
    check_pins(cooperative.charter, load_plugins())


def test_nothing_is_pinned_of_the_core_and_bytes_stay(tmp_path, base, packages):
    packages.add("mine-a")
    own = found(tmp_path / "home", base)
    assert own.charter.amendment.plugins == ()
    assert b"plugins" not in canonical_json(own.charter.amendment.model_dump(mode="json"))
    assert "plugins" not in (own.folder / "cooperative.toml").read_text()
    packages.remove("mine-a")
    check_pins(own.charter, load_plugins())


def test_a_missing_plugin_is_named_with_its_version(cooperative, packages):
    packages.remove("mine-a")
    assert refuse(cooperative) == (
        "Cannot use charter 'tiny': expected the plugin mine-a 0.1.0, got none installed. "
        "Install the charter's with `pip install mine-a==0.1.0`. Or have the coordinator pin "
        "another with `molora coop amend --pin`."
    )
    # Where a name is unknown now, an amendment says which package it needs.
    with pytest.raises(PluginError, match=r"expected the plugin mine-a 0\.1\.0, got none"):
        amend_by_settings(cooperative, ["training.steps=9"])
    amended, _ = amend_by_settings(cooperative, ["fusion.router=evidence-zero"])
    assert amended.charter.amendment.plugins == ()
    with pytest.raises(UnknownNameError, match="Unknown router 'mine-a'"):
        amend_by_settings(amended, ["fusion.router=mine-a"])


def test_another_version_and_other_files_are_told_apart(cooperative, packages):
    packages.upgrade("mine-a", "0.2.0")
    assert "expected the plugin mine-a 0.1.0, got 0.2.0. Install" in refuse(cooperative)
    packages.upgrade("mine-a", "0.1.0")
    check_pins(cooperative.charter, load_plugins())
    packages.change("mine-a", OTHER)
    pin, now = cooperative.charter.amendment.plugins[0].hash, find_installed("mine-a").hash()
    assert f"mine-a 0.1.0 with the hash {pin[:12]}, got other files with {now[:12]}" in refuse(
        cooperative
    )


def test_a_changed_plugin_is_pinned_anew_only_if_asked(cooperative, packages):
    packages.change("mine-a", OTHER)
    with pytest.raises(PluginError, match="Pin what is installed here with --pin"):
        amend_by_settings(cooperative, ["training.steps=9"])
    amended, changes = amend_by_settings(cooperative, [], renew_pins=True)
    assert [each.key for each in changes] == ["plugins"]
    assert changes[0].before.startswith("mine-a 0.1.0 (") != changes[0].after
    assert amended.charter.amendment.plugins[0].hash == find_installed("mine-a").hash()
    check_pins(amended.charter, load_plugins())
    assert amend_by_settings(amended, [], renew_pins=True)[1] == []
    for key in ("plugins", "plugins.0.hash"):
        with pytest.raises(CharterError, match="KEY is not the number or plugins"):
            amend_by_settings(amended, [f"{key}=none"])


def test_an_amendment_pins_what_it_names_and_drops_what_it_does_not(cooperative, packages):
    packages.add("mine-b")
    amended, _ = amend_by_settings(cooperative, ["fusion.compare=mine-b,evidence"])
    assert [pin.name for pin in amended.charter.amendment.plugins] == ["mine-a", "mine-b"]
    amended, _ = amend_by_settings(amended, ["fusion.router=evidence", "fusion.fallback=mine-b"])
    assert [pin.name for pin in amended.charter.amendment.plugins] == ["mine-b"]
    unpinned = amended.charter.amendment.model_copy(update={"plugins": ()})
    check_pins(Charter(identity=amended.charter.identity, amendment=unpinned), load_plugins())


def test_a_name_of_an_unpinned_plugin_is_refused_where_others_are_pinned(cooperative, packages):
    packages.add("mine-b")
    rules = cooperative.charter.amendment.fusion.model_copy(
        update={"compare": name_choices("mine-b")}
    )
    amendment = cooperative.charter.amendment.model_copy(update={"fusion": rules})
    with pytest.raises(PluginError, match="no router 'mine-b' of plugins without a pin, got that"):
        check_pins(
            Charter(identity=cooperative.charter.identity, amendment=amendment), load_plugins()
        )


def test_a_predictor_is_pinned_only_as_headline(cooperative, packages):
    packages.add("mine-p", PREDICTOR.format(name="mine-p", module="mine_p"))
    amended, _ = amend_by_settings(cooperative, ["training.steps=9"])
    assert [pin.name for pin in amended.charter.amendment.plugins] == ["mine-a"]
    amended, _ = amend_by_settings(amended, ["fusion.headline=mine-p"])
    assert [pin.name for pin in amended.charter.amendment.plugins] == ["mine-a", "mine-p"]


def test_what_a_charter_pins_decides_whether_anything_is_done(
    cooperative, packages, base, tmp_path
):
    folders = [
        contribute(cooperative, base, tmp_path / "made", name, seed=seed)
        for seed, name in enumerate(("law-1", "art-1"), 1)
    ]
    under = CharterAndBase(cooperative.charter, base)
    packages.change("mine-a", OTHER)
    plugins = load_plugins()

    def train():
        check_choices(under, domain="law", plugins=plugins)

    def serve():
        home = CoordinatorHome(cooperative.folder)
        with Ledger(cooperative.ledger_path) as ledger:
            CoordinatorWorker(home, cooperative, ledger, plugins).run()

    for act in (
        train,
        serve,
        lambda: admit_contributions(cooperative, folders, plugins=plugins),
        lambda: fuse_contributions(cooperative, folders, plugins=plugins),
    ):
        with pytest.raises(PluginError, match=r"expected the plugin mine-a 0\.1\.0 with the hash"):
            act()
    packages.change("mine-a", WORK)
    fused = fuse_contributions(cooperative, folders, plugins=load_plugins())
    used = fused.result.result["plugins"]["router"]
    assert {"name": "mine-a", "plugin": "mine-a", "version": "0.1.0"} in used


def test_a_plugin_of_one_file_is_pinned_by_its_hash(tmp_path, base, packages, monkeypatch):
    packages.add("mine-a")
    path = tmp_path / "my_file.py"
    path.write_text((packages.root / "mine_a" / "__init__.py").read_text().replace("-a", "-f"))
    packages.remove("mine-a")
    monkeypatch.setenv("MOLORA_PLUGINS", str(path))
    packages.refresh()
    home = found(tmp_path / "home", base, compare=("mine-f",))
    (pin,) = home.charter.amendment.plugins
    assert (pin.name, pin.version) == ("my_file.py", "")
    check_pins(home.charter, load_plugins())
    path.write_text(path.read_text() + "# changed\n")
    assert "expected the one-file plugin my_file.py with the hash" in refuse(home)
    monkeypatch.setenv("MOLORA_PLUGINS", "")
    assert refuse(home).startswith(
        f"Cannot use charter 'tiny': expected the one-file plugin my_file.py with the hash "
        f"{pin.hash[:12]}, got none. Get it from the coordinator, and pass it with `molora "
        "--plugin my_file.py`."
    )


def test_nothing_but_plugins_is_hashed_for_a_charter_from_outside(cooperative):
    pins = (PluginPin(name="torch", version=find_installed("torch").version, hash="0" * 64),)
    amendment = cooperative.charter.amendment.model_copy(update={"plugins": pins})
    hostile = Charter(identity=cooperative.charter.identity, amendment=amendment)
    with pytest.raises(PluginError, match="got none installed"):
        check_pins(hostile, load_plugins())


def test_a_plugin_that_a_script_hands_over_has_no_pin(cooperative, packages):
    import mine_a

    packages.remove("mine-a")
    plugins = load_plugins(extra=[("script", mine_a)])
    assert build_pins(cooperative.charter, plugins) == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "a; rm -rf ~"},
        {"name": "-r"},
        {"name": "a" * 101},
        {"version": "1 --index-url"},
        {"version": "1" * 64},
        {"hash": "0" * 63},
        {"extra": "key"},
    ],
)
def test_pins_from_outside_are_bounded(wrong):
    with pytest.raises(ValueError):
        PluginPin.model_validate({"name": "a", "version": "1", "hash": "0" * 64, **wrong})


def test_pins_are_few_and_each_plugin_has_one(tmp_path, cooperative):
    pin = {"name": "mine-a", "version": "1", "hash": "0" * 64}
    many = [{**pin, "name": f"mine-{number}"} for number in range(65)]
    for wrong in (many, [pin, {**pin, "name": "Mine_A"}]):
        with pytest.raises(ValueError):
            Amendment.model_validate({"plugins": wrong})
    write_charter(cooperative.charter, tmp_path / "a.toml")
    assert load_charter(tmp_path / "a.toml") == cooperative.charter
    text = (tmp_path / "a.toml").read_text().replace('version = "0.1.0"', 'version = "`ls`"')
    with pytest.raises(CharterError, match=r"amendment\.plugins\.0\.version"):
        parse_charter(text)
