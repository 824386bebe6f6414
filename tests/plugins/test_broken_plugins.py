"""Every broken plugin of the table is caught with a message or harmless, on a real cooperative."""

import shutil
from pathlib import Path

import pytest
from broken_plugins import CASES, ORIGIN, Workshop, tell

from molora_fed.cooperative.cooperative import open_cooperative
from molora_fed.plugins import load_plugins

KEPT = Path(__file__).parent.parent / "data" / "kept" / "cooperative"
FIGURES = ("gain_percent", "losses", "gates", "guard", "router")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken") / "cooperative"
    shutil.copytree(KEPT, folder)
    return Workshop(open_cooperative(folder), folder)


@pytest.fixture(scope="module")
def honest(workshop):
    """What the cooperative fuses to without any broken plugin."""
    return workshop.fuse()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.use} {case.name}")
def test_a_broken_plugin_is_caught_with_a_message_or_harmless(workshop, honest, case):
    said = tell(workshop, case)
    assert case.now in said
    assert "\n" not in said and "Unexpected" not in said and "report it" not in said
    if "harmless" not in said and case.use not in ("loading", "lifecycle operator"):
        assert "molora-broken 0.1.0" in said
        assert case.name in said


def test_the_others_are_measured_as_if_no_broken_plugin_were_there(workshop, honest):
    from broken_plugins import CASES as cases

    tell(workshop, next(case for case in cases if case.use == "compared router"))
    fused = workshop.fused
    for router, gain in fused["gain_percent"].items():
        if router in honest["gain_percent"]:
            assert gain == honest["gain_percent"][router]
    assert fused["losses"]["fused"].keys() >= {"b-unseeded", fused["router"]}
    own = {r.name for r in load_plugins().gain_predictors}
    assert {n: f for n, f in _claims(fused).items() if n in own} == _claims(honest)


def _claims(result):
    return {n: (f["point"], f["low"], f["high"]) for n, f in result["forecasts"].items()}


def test_the_cooperative_fuses_again_to_the_same_figures(workshop, honest):
    again = workshop.fuse()
    assert {key: again[key] for key in FIGURES} == {key: honest[key] for key in FIGURES}
    assert not any(
        why.startswith("failed") for kind in again["not_measured"].values() for why in kind.values()
    )


def test_every_hook_has_a_broken_plugin():
    uses = {case.use.removeprefix("published ").removeprefix("compared ") for case in CASES}
    assert {registry.kind for registry in load_plugins().registries().values()} <= uses
    assert ORIGIN
