"""A member measures the experts on its shortlist, and the report says what that costs."""

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from fusion_helpers import build_charter, build_cooperative

from molora_fed.bank import build_calibration_bank, build_held_out_bank
from molora_fed.bank.passes import ColumnMaker
from molora_fed.cooperative.cooperative import check_charter_names
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import CharterError
from molora_fed.evaluation.evaluate import compute_domain_losses, compute_router_losses
from molora_fed.fusion.fuse import fuse_texts
from molora_fed.fusion.local_members import LocalMembers, drop_text
from molora_fed.fusion.plan import plan_fusion
from molora_fed.fusion.private_texts import PrivateTexts
from molora_fed.fusion.shortlist import choose_blocks, choose_experts
from molora_fed.fusion.sum_rounds import SHORTLIST
from molora_fed.plugins import load_plugins
from molora_fed.reporting.privacy import describe_privacy
from molora_fed.testing import build_synthetic_bank
from molora_fed.types import Split

SCHEMA = json.loads((Path(__file__).parents[3] / "docs" / "report.schema.json").read_text())
ROUTERS = {"router": "evidence", "compare": ("evidence-zero",)}


@pytest.fixture(scope="module")
def plugins():
    return load_plugins()


@pytest.fixture(scope="module")
def cooperative(tiny_checkpoint, tmp_path_factory):
    return build_cooperative(tiny_checkpoint(), tmp_path_factory.mktemp("adapters"))


def build_private(base, summing="robust", **fusion):
    charter = build_charter(base, **{**ROUTERS, **fusion})
    changes = {"privacy_mode": "private", "summing": summing}
    return charter.model_copy(update={"identity": charter.identity.model_copy(update=changes)})


def fuse_privately(cooperative, charter, folder, plugins):
    base, contributions = cooperative
    experts = [drop_text(one) for one in contributions]
    asked = LocalMembers.open(base, charter, contributions, experts, folder, plugins=plugins)
    texts = PrivateTexts(experts, asked)
    return fuse_texts(base, charter, texts, folder / "coordinator", plugins=plugins), asked


def count_runs(monkeypatch):
    """Blocks run through an expert, from now on; one number for each pass."""
    run, blocks = ColumnMaker.run, []

    def note(self, *values, **more):
        blocks.append(len(self.blocks))
        return run(self, *values, **more)

    monkeypatch.setattr(ColumnMaker, "run", note)
    return blocks


def build_blocks(clusters):
    clusters = np.array(clusters, dtype=np.int32)
    return Blocks("law", Split.CALIBRATION, clusters.copy(), clusters, clusters)


def test_a_choice_has_the_best_experts_the_base_and_ones_own():
    bank = build_synthetic_bank(num_experts=6)  # expert e is good at domain e
    names = bank.expert_names
    losses = [float(bank.expert_nll(e).double().mean()) for e in range(6)]
    first, *others = sorted(set(range(6)) - {3}, key=lambda e: losses[e])
    last = others[-1]
    assert choose_experts(bank, 2, names[last]) == {names[last], names[first]}
    assert choose_experts(bank, 3, names[last]) >= choose_experts(bank, 2, names[last])
    assert choose_experts(bank, 6, names[0]) == set(names)
    assert len({choose_experts(bank, 4, names[1]) for _ in range(3)}) == 1
    if names[0] == "base":
        assert "base" in choose_experts(bank, 2, names[last])


def test_blocks_for_a_choice_are_of_as_many_documents_as_can_be():
    rows = [[document] * 4 for document in (0, 0, 0, 0, 1, 1, 2, 3)]
    chosen = choose_blocks(build_blocks(rows), 4)
    assert chosen.clusters[:, 1].tolist() == [0, 1, 2, 3]
    assert choose_blocks(build_blocks(rows), 6).clusters[:, 1].tolist() == [0, 0, 0, 1, 2, 3]
    assert len(choose_blocks(build_blocks(rows), 99)) == 8
    assert chosen.fingerprint == choose_blocks(build_blocks(rows), 4).fingerprint


def test_stand_ins_have_the_bases_columns_and_are_not_run(cooperative, plugins, tmp_path):
    base, contributions = cooperative
    plan = plan_fusion(base, build_private(base), contributions, plugins)
    blocks = [contributions[0].calibration]

    def build(folder, **more):
        return build_calibration_bank(folder, base, plan.experts, blocks, **plan.bank, **more)

    whole, short = build(tmp_path / "all"), build(tmp_path / "some", stand_ins=("law-1",))
    away = plan.experts.index(next(e for e in plan.experts if e.name == "law-1"))
    assert short.expert_names == whole.expert_names and short.has_base_expert
    for expert in range(len(plan.experts)):
        wanted = whole.base_logprob if expert == away else whole.logprob[..., expert]
        assert short.logprob[..., expert].equal(wanted)
    columns = [len(list((tmp_path / name).glob("logprob*.bin"))) for name in ("all", "some")]
    assert columns[1] == columns[0] - 1


@pytest.mark.parametrize("summing", ["masked", "robust"])
def test_a_fusion_with_shortlists_says_what_they_cost(
    cooperative, plugins, tmp_path, monkeypatch, summing
):
    base, contributions = cooperative
    blocks = count_runs(monkeypatch)
    charter = build_private(base, summing, shortlist=2, merges=())
    fused, asked = fuse_privately(cooperative, charter, tmp_path, plugins)
    jsonschema.validate(fused.result, SCHEMA)
    found = fused.result["sums"]["shortlist"]
    assert (found["experts"], found["of"]) == (2, 4)
    assert found["block_passes"]["shortlist"] == sum(blocks)
    # Twelve held-out blocks are fewer than the cost is measured on, so it is known exactly.
    plan = plan_fusion(base, charter, contributions, plugins)
    routers = {"evidence": fused.fused.router}
    whole = build_held_out_bank(
        tmp_path / "check", base, plan.experts, [c.held_out for c in contributions],
        kept=[asked.members[c.contributor]._kept for c in contributions], **plan.bank,
    )  # fmt: skip
    for name, router in routers.items():
        true = compute_domain_losses(whole, compute_router_losses(whole, router).nll)
        said = fused.result["losses"]["fused"][name]
        cost = np.mean([said[domain] - true[domain] for domain in true])
        assert found["cost_nats"][name]["point"] == pytest.approx(cost, abs=1e-5)
        assert found["cost_nats"][name]["low"] < cost < found["cost_nats"][name]["high"]
    assert f"lost {found['cost_nats']['evidence']['point']:+.4f} nats" in describe_privacy(
        fused.result
    )
    # Everybody measured its own expert, so its own loss is none of the base's.
    for one in contributions:
        own = fused.result["losses"]["specialists"][one.contributor][one.domain]
        assert own != fused.result["losses"]["base"][one.domain]


def test_a_shortlist_of_all_experts_is_none(cooperative, plugins, tmp_path):
    base, _ = cooperative
    results, questions = [], []
    for number, shortlist in enumerate((None, 4)):
        charter = build_private(base, shortlist=shortlist)
        fused, asked = fuse_privately(cooperative, charter, tmp_path / str(number), plugins)
        results.append({n: fused.result[n] for n in ("losses", "equal_weight", "gates", "sums")})
        questions.append(asked.questions)
    assert results[0] == results[1] and "shortlist" not in results[1]["sums"]
    for one, other in zip(*questions, strict=True):
        assert one.place == other.place and one.state.keys() == other.state.keys()
        assert all(tensor.equal(other.state[name]) for name, tensor in one.state.items())


def test_a_member_that_is_asked_again_finds_its_choice_and_its_columns(
    cooperative, plugins, tmp_path, monkeypatch
):
    base, _ = cooperative
    charter = build_private(base, shortlist=2)
    first, _ = fuse_privately(cooperative, charter, tmp_path, plugins)
    blocks = count_runs(monkeypatch)
    again, _ = fuse_privately(cooperative, charter, tmp_path, plugins)
    assert blocks == []
    assert again.result["sums"] == first.result["sums"]
    assert again.result["losses"] == first.result["losses"]


def test_an_absurd_cost_is_refused_by_name(cooperative, plugins, tmp_path):
    base, _ = cooperative
    charter = build_private(base, shortlist=2)
    _, asked = fuse_privately(cooperative, charter, tmp_path, plugins)
    member = asked.members["art-1"]
    original = member.measure

    def lie(question, rounds, **more):
        found = original(question, rounds, **more)
        if f"{SHORTLIST}.n" in found:
            found[f"{SHORTLIST}.n"] = found[f"{SHORTLIST}.n"] + 1e5
        return found

    member.measure = lie
    texts = PrivateTexts([drop_text(one) for one in cooperative[1]], asked)
    with pytest.raises(Exception, match="'art-1'"):
        fuse_texts(base, charter, texts, tmp_path / "again", plugins=plugins)


def test_shortlists_are_refused_where_they_mean_nothing(cooperative, plugins):
    base, contributions = cooperative
    pooled = build_charter(base, **ROUTERS, shortlist=2)
    with pytest.raises(CharterError, match=r"no fusion.shortlist but.*got pooled.*shortlist 2"):
        check_charter_names(pooled, plugins)
    check_charter_names(build_private(base, shortlist=2), plugins)
    assert plan_fusion(base, pooled, contributions, plugins).shortlist is None
    reads = build_private(base, router="linear", options={"input": "mean_hidden"}, shortlist=2)
    with pytest.raises(CharterError, match=r"average state.*got 'linear'"):
        plan_fusion(base, reads, contributions, plugins)


def test_a_charter_without_shortlist_has_the_bytes_it_always_had(cooperative):
    base, _ = cooperative
    plain, short = build_charter(base), build_charter(base, shortlist=3)
    assert "shortlist" not in plain.amendment.fusion.model_dump(mode="json")
    assert short.amendment.fusion.model_dump(mode="json")["shortlist"] == 3
