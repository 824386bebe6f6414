"""`molora generate` and the routers of a charter: what may write text, and what may not."""

import json
import shutil

import pytest

from molora_fed.charter import FusionRules
from molora_fed.cooperative.cooperative import amend_cooperative, open_cooperative


@pytest.fixture(scope="module")
def fuse_with(fused_once, tmp_path_factory):
    """Fuse the admitted contributions under other fusion rules; returns the folder."""
    from molora_cli.main import run

    def fuse(**rules):
        root = tmp_path_factory.mktemp("routers")
        shutil.copytree(fused_once / "tiny", root / "tiny")
        cooperative = open_cooperative(root / "tiny")
        old = cooperative.charter.amendment
        fusion = FusionRules.model_validate({"compare": (), "fallback": "", **rules})
        amendment = old.model_copy(update={"fusion": fusion, "number": old.number + 1})
        with cooperative.open_ledger() as ledger:
            amend_cooperative(cooperative, ledger, amendment)
        assert run(["fuse", "--cooperative", str(root / "tiny"), "--out", str(root / "o")]) == 0
        return root / "o"

    return fuse


def test_a_router_that_sees_the_future_is_reported_but_never_generates(molora, fuse_with):
    folder = fuse_with(router="linear-noncausal", options={"steps": 5})
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["losses"]["fused"].keys() == {"linear-noncausal"}
    ran = molora("generate", folder, "--prompt", "abc", "--max-new-tokens", 4)
    assert ran.code == 30
    assert ran.out == ""
    assert "Cannot generate with router 'linear-noncausal': expected a causal router" in ran.err
    assert len(ran.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("router", "rules"),
    [
        ("dispatch", {"options": {"read_tokens": 4}}),
        ("mlp", {"options": {"steps": 5}, "top_k": 2}),
        ("hard", {"options": {"steps": 5}, "mixture": "logit"}),
    ],
)
def test_the_others_generate(molora, fuse_with, router, rules):
    folder = fuse_with(router=router, **rules)
    ran = molora("generate", folder, "--prompt", "abc dab", "--max-new-tokens", 6)
    assert ran.code == 0
    assert ran.out.startswith("abc dab")
    assert ran.err.startswith("gates: ")


def test_experts_go_on_alone_or_merged_and_nothing_else(molora, fuse_with):
    folder = fuse_with(router="evidence-zero")
    asked = ["generate", folder, "--prompt", "abc dab", "--max-new-tokens", 3, "--experts"]
    for experts in ("1", "merged"):
        ran = molora(*asked, experts)
        assert ran.code == 0 and ran.out.startswith("abc dab"), ran.err
    for wrong in ("0", "-1", "all", "9" * 5000):
        ran = molora(*asked, wrong)
        assert ran.code == 2
        assert "expected a number from 1 on or 'merged'" in " ".join(ran.err.split())
