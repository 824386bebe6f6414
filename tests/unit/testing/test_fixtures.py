"""The fixtures that come with molora-fed, and the builders behind them."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from molora_fed.contributions.admission import admit
from molora_fed.contributions.states import ContributionState
from molora_fed.cooperative.fuse import fuse_contributions
from molora_fed.testing import build_case, build_past, build_tiny_adapters
from molora_fed.testing.targets import open_target

HEAVY = ("torch", "transformers", "numpy", "molora_fed.bank", "peft")


def test_a_tiny_cooperative_fuses_and_each_test_has_its_own(tiny_cooperative, tmp_path):
    folders = list(tiny_cooperative.contributions.values())
    assert sorted(tiny_cooperative.contributions) == ["art-1", "law-1"]
    fused = fuse_contributions(tiny_cooperative.cooperative, folders).result.result
    assert fused["gain_percent"][fused["router"]]["vs_best_alone"] > 1
    fallback = tiny_cooperative.cooperative.charter.amendment.fusion.fallback
    assert fused["gain_percent"].keys() == {fused["router"], fallback}  # nothing is compared
    assert tmp_path in tiny_cooperative.cooperative.folder.parents


def test_a_tiny_candidate_is_honest(tiny_candidate):
    decision = admit(tiny_candidate)
    assert decision.state == ContributionState.ADMITTED
    assert decision.refusals == () and len(decision.checks) == 15


def test_bank_base_and_adapters_go_together(tiny_bank, tiny_base, tiny_model):
    assert tiny_bank.num_experts == len(tiny_bank.domains) == 3
    assert tiny_base.hidden_size == 32
    names = dict(tiny_model().named_modules())
    assert all(names.keys() >= one.updates.keys() for one in build_tiny_adapters())
    assert {one.kind for one in build_tiny_adapters()} == {"lora", "svd", "delta"}


def test_made_up_losses_are_as_they_are_asked_for():
    case = build_case(4, specialists=2, with_pilots=True, is_full=False)
    assert len(case.losses.specialists) == 8
    assert all(len(row) == 1 for row in case.losses.specialists.values())
    assert all(len(row) == 4 for row in case.pilots.specialists.values())
    for name, domain in case.losses.own_domain.items():
        own = case.losses.specialists[name][domain]
        assert own < case.pilots.specialists[name][domain] < case.losses.base[domain]
    groups = {outcome.case.group for outcome in build_past(5)}
    assert len(groups) == 5 and build_past(5) == build_past(5)


def test_a_function_takes_no_options():
    with pytest.raises(Exception, match="expected a class with Options, got a function"):
        open_target(lambda: None, {"factor": 2})


def test_the_fixtures_are_an_entry_point_of_pytest_that_loads_nothing_heavy():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    module = project["project"]["entry-points"]["pytest11"]["molora_fed"]
    script = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
