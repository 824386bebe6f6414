"""A fusion whose routers are made from published statistics, and whose figures from sums."""

import json
import types
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from fusion_helpers import build_charter, build_cooperative, fuse_apart, publish
from molora_kalavai.discriminant import assume_constants, diagonalise
from molora_kalavai.moments import collect_moments

from molora_fed import OutputRouter, hookimpl
from molora_fed.bank import Expert, build_calibration_bank
from molora_fed.cooperative.publish import check_described, measure_statistics
from molora_fed.errors import CharterError, CorpusError, RoutingError
from molora_fed.fusion.boundary import NotMeasured
from molora_fed.fusion.fuse import fuse
from molora_fed.fusion.plan import check_published_router, plan_fusion
from molora_fed.fusion.published_fits import PublishedFits
from molora_fed.fusion.published_rounds import plan_rounds
from molora_fed.fusion.sum_questions import SumQuestion, TextCounts
from molora_fed.plugins import load_plugins
from molora_fed.reporting.privacy import describe_privacy
from molora_fed.routing.probes import find_leak, find_step_fault
from molora_fed.routing.published import make_published
from molora_fed.routing.summed import FitSetting
from molora_fed.routing.top_k import limit_experts

SCHEMA = json.loads((Path(__file__).parents[3] / "docs" / "report.schema.json").read_text())
ROUTERS = {"router": "statistics", "compare": ("evidence-zero", "evidence")}


@pytest.fixture(scope="module")
def plugins():
    return load_plugins()


@pytest.fixture(scope="module")
def cooperative(tiny_checkpoint, tmp_path_factory):
    return build_cooperative(tiny_checkpoint(), tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize("summing", ["masked", "robust"])
def test_routers_come_of_statistics_and_all_else_is_measured(
    cooperative, plugins, summing, tmp_path
):
    base, contributions = cooperative
    charter = publish(build_charter(base, **ROUTERS), summing)
    found, asked = fuse_apart(base, charter, contributions, tmp_path, plugins)
    pooled = fuse(
        base, build_charter(base, **ROUTERS), contributions, tmp_path / "pooled", plugins=plugins
    )
    mine, theirs = found.result, pooled.result
    jsonschema.validate(mine, SCHEMA)
    assert mine["privacy_mode"] == "statistics"
    assert [question.place for question in asked.questions] == ["losses", "held-out"]
    for method in ("base", "uniform", "weight_average", "token_oracle"):
        assert mine["losses"][method] == pytest.approx(theirs["losses"][method], abs=1e-5)
    for name, forecast in theirs["forecasts"].items():
        assert mine["forecasts"][name]["point"] == pytest.approx(forecast["point"], abs=1e-3)
    assert set(mine["losses"]["fused"]) == {"statistics", "evidence-zero"}
    assert "from published statistics" in mine["not_measured"]["router"]["evidence"]
    assert mine["guard"] == {}
    for domain, loss in theirs["losses"]["fused"]["evidence-zero"].items():
        assert mine["losses"]["fused"]["evidence-zero"][domain] == pytest.approx(loss, abs=1e-6)
    assert "not judged" in mine["not_measured"]["guard"]["statistics"]
    assert "no guard judged them on calibration text" in describe_privacy(mine)
    # With what losses would tell it is the pooled router, to a few hundredths of a nat.
    assert mine["losses"]["fused"]["statistics"]["art"] == pytest.approx(
        theirs["losses"]["fused"]["statistics"]["art"], abs=0.01
    )


def test_of_a_shortlist_all_that_is_lost_is_in_the_figures(cooperative, plugins, tmp_path):
    """Nothing is fitted, so routers are the same; and what the figures are off by is said."""
    base, contributions = cooperative
    rules = {**ROUTERS, "merges": ()}
    whole, short = (
        fuse_apart(
            base, publish(build_charter(base, **rules, shortlist=size)), contributions,
            tmp_path / str(size), plugins,
        )[0].result
        for size in (None, 2)
    )  # fmt: skip
    jsonschema.validate(short, SCHEMA)
    for name, cost in short["sums"]["shortlist"]["cost_nats"].items():
        more, less = (one["equal_weight"][f"fused:{name}"]["point"] for one in (short, whole))
        assert cost["point"] == pytest.approx(more - less, abs=1e-5)


@pytest.fixture(scope="module")
def described(cooperative, tmp_path_factory):
    """Statistics of each contributor by name, and a bank of all their text in one place."""
    base, contributions = cooperative
    charter = publish(build_charter(base, **ROUTERS))
    folder = tmp_path_factory.mktemp("described")
    statistics = {
        one.contributor: measure_statistics(base, charter, one.calibration, folder / "states")
        for one in contributions
    }
    bank = build_calibration_bank(
        folder / "bank", base, [Expert("base", None)], [one.calibration for one in contributions],
        readings=frozenset({"base_hidden"}), batch=8,
    )  # fmt: skip
    return statistics, bank


def build_setting(statistics, options):
    domains = tuple(sorted({one.domain for one in statistics.values()}))
    width = next(iter(statistics.values())).width
    return FitSetting(("base", *statistics), domains, width, 1, "probability", options, 0)


def test_what_is_published_adds_up_to_what_all_text_in_one_place_gives(described, plugins):
    """The closed form of pooled text, with the same constants: the same probabilities."""
    statistics, bank = described
    router = plugins.routers.resolve("statistics")
    made = make_published(router, statistics, build_setting(statistics, router.Options()))
    fold_of = np.zeros(bank.tokens.shape, dtype=np.int64)
    (pooled,) = collect_moments(bank, "base_hidden", fold_of, "statistics")
    wanted = assume_constants(diagonalise(pooled.without_documents()))
    hidden = bank.view(slice(0, 8)).base_hidden
    count = torch.arange(1, hidden.shape[1] + 1).float()
    mean = hidden.cumsum(dim=1) / count.unsqueeze(-1)
    found = made.discriminant(mean.device)
    mine, theirs = (one.log_posterior(mean, count).exp() for one in (found, wanted))
    assert float((mine - theirs).abs().max()) < 1e-5
    assert 0.01 < float(theirs.min()) < float(theirs.max()) - 0.1  # text decides


def test_gates_are_a_domains_own_and_the_same_statistics_give_the_same_bits(described, plugins):
    statistics, bank = described
    router = plugins.routers.resolve("statistics")
    setting = build_setting(statistics, router.Options())
    made, again = (make_published(router, statistics, setting) for _ in range(2))
    assert all(torch.equal(t, again.state_tensors()[n]) for n, t in made.state_tensors().items())
    gates = dict(zip(setting.expert_names, made.mixtures.T, strict=True))
    art, law = range(2)
    assert float(gates["art-1"][art]) == pytest.approx(0.9 + 0.1 / 4)
    assert float(gates["law-1"][law]) == float(gates["law-2"][law]) == pytest.approx(0.45 + 0.1 / 4)
    assert made.mixtures.sum(dim=1).tolist() == pytest.approx([1.0, 1.0])
    view = bank.view(slice(0, 2))
    assert find_leak(made.gates, view) is None and find_step_fault(made, view) is None


def test_who_can_be_made_from_statistics_is_said_before_there_are_any(cooperative, plugins):
    base, _ = cooperative
    for router, options in (("statistics", {}), ("uniform", {}), ("evidence-zero", {})):
        charter = publish(build_charter(base, router=router, options=options, compare=()))
        check_published_router(charter, plugins)
    for router, options in (
        ("evidence", {}), ("linear", {}), ("statistics", {"input": "mean_hidden"}),
    ):  # fmt: skip
        charter = publish(build_charter(base, router=router, options=options, compare=()))
        with pytest.raises(CharterError, match=f"from published statistics .*, got '{router}'"):
            check_published_router(charter, plugins)


def test_a_limit_on_experts_limits_a_router_made_from_statistics(cooperative, plugins, described):
    base, _ = cooperative
    charter = publish(build_charter(base, router="statistics", top_k=1, compare=()))
    check_published_router(charter, plugins)
    router = limit_experts(plugins.routers.resolve("statistics"), 1)
    statistics, bank = described
    made = make_published(router, statistics, build_setting(statistics, router.Options()))
    assert int((made.gates(bank.view(slice(0, 1))) > 0).sum(dim=-1).max()) == 1


def test_a_class_that_learns_its_own_way_is_not_made_as_its_base(described, plugins):
    statistics, _ = described
    router = plugins.routers.resolve("statistics")

    class Other(router):
        @classmethod
        def learn(cls, bank, options, seed, progress):
            raise AssertionError

    with pytest.raises(RoutingError, match="from published statistics"):
        make_published(Other, statistics, build_setting(statistics, Other.Options()))


@pytest.mark.parametrize("place", ["fit 0 0", "fit 0 1", "judge 0", "train 0"])
def test_a_member_answers_no_fit_and_no_guard(cooperative, plugins, place):
    base, contributions = cooperative
    charter = publish(build_charter(base, **ROUTERS))
    plan = plan_fusion(base, charter, contributions, plugins)
    counts = {one.contributor: count(one) for one in contributions}
    rounds = plan_rounds(plan, base.hidden_size, counts, seed=7)
    assert list(rounds.limits) == ["losses", "held-out"]
    with pytest.raises(RoutingError, match="expected a place of a fusion under the charter"):
        rounds.lay_out(SumQuestion(place, ("statistics",), {}))
    # What rides along with a place that is asked adds nothing to it.
    bare, more = (SumQuestion("losses", names, {}) for names in ((), ("statistics",)))
    assert rounds.lay_out(bare).length == rounds.lay_out(more).length == rounds.limits["losses"]
    private = plan_fusion(
        base, publish(build_charter(base), mode="private"), contributions, plugins
    )
    with pytest.raises(RoutingError, match="expected a place of a fusion under the charter"):
        plan_rounds(private, base.hidden_size, counts, seed=7).lay_out(bare)


def count(one):
    names = ("left_out", "empty", "grams", "own", "union", "base", "kept", "after")
    tokens = len(one.calibration) * (one.calibration.block_size - 1)
    return TextCounts(
        domain=one.domain, tokens=tokens, blocks=len(one.held_out), **dict.fromkeys(names, 0)
    )


def test_too_little_text_and_no_statistics_are_said_in_one_line(cooperative, plugins, tmp_path):
    base, contributions = cooperative
    charter = publish(build_charter(base, **ROUTERS))
    blocks = contributions[0].calibration
    few, same = blocks.take(7), replace(blocks, clusters=blocks.clusters * 0)
    for wrong, got in ((few, "224 of"), (same, "384 of 1")):
        with pytest.raises(CorpusError, match=f"256 tokens .* of 4 documents at least.*{got}"):
            check_described(base, charter, wrong)
    with pytest.raises(CorpusError, match="of 'art-1': expected statistics of hidden states"):
        plan = plan_fusion(base, charter, contributions, plugins)
        art = [one for one in plan.contributions if one.contributor == "art-1"]
        PublishedFits(
            replace(plan, contributions=tuple(art)),
            plan_rounds(
                plan, base.hidden_size, {one.contributor: count(one) for one in art}, seed=7
            ),
            NotMeasured(),
        )


def test_who_cannot_be_fitted_by_sums_is_said_before_anybody_trains(cooperative, plugins):
    class PooledOnly(OutputRouter):
        readings = frozenset({"evidence"})

        @classmethod
        def learn(cls, bank, options, seed, progress):
            return cls(bank.num_experts, options)

        def scores(self, view):
            return view.evidence

    base, _ = cooperative
    module = types.ModuleType("pooled")
    module.register_routers = hookimpl(
        lambda register: register("pooled-only", PooledOnly, summary="x", source="own")
    )
    known = load_plugins([("pooled", module)])
    for router in ("evidence", "linear", "uniform", "evidence-mixed"):
        check_published_router(publish(build_charter(base, router=router), mode="private"), known)
    charter = publish(build_charter(base, router="pooled-only"), mode="private")
    with pytest.raises(CharterError, match=r"fitted by sums with its options, got 'pooled-only'"):
        check_published_router(charter, known)
