"""Studies `collapse` and `cross-lingual`: counting, plans, and what they conclude."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from molora_kalavai.evidence import ZeroOptions, ZeroTrainingEvidenceRouter
from molora_kalavai.linear import LinearOptions, LinearRouter
from molora_studies.framework.actions import open_corpus
from molora_studies.framework.contract import Cell
from molora_studies.framework.substrate import (
    BaseSettings,
    FusionSettings,
    Member,
    SpecialistSettings,
    plan_base,
    plan_corpus,
    plan_fusion,
    plan_mean,
    plan_specialist,
)
from molora_studies.kalavai import refits
from molora_studies.kalavai.collapse import CollapseOptions, CollapseStudy, Count
from molora_studies.kalavai.cross_lingual import CrossLingualOptions, CrossLingualStudy
from molora_studies.kalavai.languages import (
    AS_PUBLISHED,
    LOST_NATS,
    ROUTERS,
    WITH_DEFAULT,
    plan_part,
)
from molora_studies.kalavai.refits import Banks, plan_refits, refit
from molora_studies.verdicts import Span
from study_tasks import DOMAINS, Run, running

from molora_fed.bank import CalibrationBank, HeldOutBank
from molora_fed.plugins import load_plugins
from molora_fed.testing import build_synthetic_bank
from molora_fed.types import Split

BASE = plan_base(
    BaseSettings(hidden=32, layers=2, heads=2, vocab_size=290, steps=30, domains=DOMAINS)
)
RECIPE = SpecialistSettings(steps=20)
SEED = 42


def plan_tiny(form: str, ours=ROUTERS):
    """The studies' fusions on made-up domains, one of them halved; hardly any step."""
    routers = {
        label: {**given, "steps": 3} if given.get("router", label) in TRAINED else given
        for label, given in (ours if form == "ours" else AS_PUBLISHED).items()
    }
    corpora = [plan_part(BASE, "birds", part, 2) for part in range(2)]
    corpora.append(plan_corpus(BASE, "tools"))
    members = [Member(c.settings["domain"], plan_specialist(BASE, c, RECIPE), c) for c in corpora]
    settings = FusionSettings(
        routers=routers,
        guarded=False,
        calibration=6,
        held_out=6,
        mixture="probability" if form == "ours" else "logit",
        base_expert=form == "ours",
    )
    return plan_fusion(f"tiny {form}", BASE, members, settings)


TRAINED = {"linear", "linear-noncausal", "mlp", "hard"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    import study_tasks

    plugins = load_plugins(extra=[("test", study_tasks)])
    with running(tmp_path_factory.mktemp("tasks")) as run_task, pytest.MonkeyPatch.context() as p:
        p.setattr(refits, "get_plugins", lambda: plugins)
        yield run_task


def test_parts_of_a_domain_are_domains_of_their_own(run: Run):
    halves = [open_corpus(run(plan_part(BASE, "birds", part, 2))) for part in range(2)]
    assert [half.domain for half in halves] == ["birds-1", "birds-2"]
    first, second = (set(half.blocks[Split.TRAIN].clusters.ravel().tolist()) for half in halves)
    assert first
    assert not first & second


def test_refits_read_the_fusions_bank_and_leave_it_alone(run: Run):
    fusion = run(plan_tiny("ours"))
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (fusion.folder / "bank").iterdir())
    found = run(
        plan_refits("refits", plan_tiny("ours"), [0, 100, 200], guarded=["linear"], seconds=1)
    ).result
    after = sorted((p.name, p.stat().st_mtime_ns) for p in (fusion.folder / "bank").iterdir())
    assert before == after
    assert found["domains"] == ["birds-1", "birds-2", "tools"]
    assert found["routers"].keys() == ROUTERS.keys()
    seeded = {label for label, each in found["routers"].items() if each["is_seeded"]}
    assert seeded == {
        label for label in ROUTERS if label.split("-")[0] in {"linear", "mlp", "hard"}
    }
    assert {n for n, each in found["routers"].items() if "guarded" in each["fits"][0]} == {"linear"}
    for each in found["routers"].values():
        assert [fit["seed"] for fit in each["fits"]] == [0, 100, 200]
    # The fusion fitted evidence on the same bank: the same figures.
    losses = fusion.result["held_out"]
    experts = [losses["base"], *losses["specialists"].values()]
    expected = {
        d: losses["fused"]["evidence"][d] - min(each[d] for each in experts)
        for d in losses["domains"]
    }
    assert found["routers"]["evidence"]["fits"][0]["excess"] == pytest.approx(expected, abs=1e-5)


def make_banks():
    return Banks(build_synthetic_bank(), build_synthetic_bank(HeldOutBank, seed=1), LOST_NATS)


class Wayward(LinearRouter):
    """Sends everything to one expert from even seeds."""

    @classmethod
    def fit(cls, bank, options, seed, progress=None):
        router = super().fit(bank, options, seed, progress)
        if seed % 2 == 0:
            router.weight.zero_()
            router.weight[0] = 0
            router.bias = 40.0
        return router

    bias = 0.0

    def score(self, pooled):
        return super().score(pooled) + self.bias * torch.tensor([1.0, 0.0, 0.0])


def test_collapsed_fits_are_counted_and_the_guard_finds_another_seed():
    options = LinearOptions(learning_rate=0.01)
    found = refit(make_banks(), (Wayward, options), [0, 1, 10, 11, 20], guarded=True)
    count = Count.of([found])
    assert found["is_seeded"]
    assert (count.lost, count.fits, count.misrouted, count.guarded) == (3, 5, 3, 0)
    assert [fit["guarded"]["attempts"] for fit in found["fits"]] == [2, 1, 2, 1, 2]
    assert count.worst_nats > LOST_NATS > count.worst_guarded_nats
    assert [fit["misrouted"] for fit in found["fits"][:2]] == [["domain-1", "domain-2"], []]
    assert count.show() == "1 of 1 sets [3 %, 100 %], 3 of 5 fits"


def test_fits_that_no_seed_changes_count_once():
    choice = (ZeroTrainingEvidenceRouter, ZeroOptions())
    found = refit(make_banks(), choice, range(7), guarded=False)
    assert not found["is_seeded"]
    assert len(found["fits"]) == 7
    count = Count.of([found, found, found])
    assert (count.fits, count.misrouted, count.guarded) == (3, 0, None)


class Lost(Wayward):
    """Sends everything to one expert from every seed."""

    @classmethod
    def fit(cls, bank, options, seed, progress=None):
        return super().fit(bank, options, 2 * seed, progress)


def test_where_no_refit_helps_the_guard_publishes_its_last_resort():
    options = LinearOptions(learning_rate=0.01, steps=5)
    banks = [build_synthetic_bank(kind, block_size=96) for kind in (CalibrationBank, HeldOutBank)]
    starts = torch.zeros_like(banks[0].document_starts)
    starts[:, 0] = True  # long documents, in which evidence soon decides
    long = [replace(bank, document_starts=starts, _derived={}) for bank in banks]
    found = refit(Banks(long[0], long[1], LOST_NATS), (Lost, options), [0, 100], guarded=True)
    for fit in found["fits"]:
        assert fit["guarded"]["replaced"]
        assert fit["guarded"]["attempts"] == 1  # equal fits are not repeated
        assert fit["guarded"]["gap"] < fit["gap"]
    assert Count.of([found]).replaced == 1  # equal fits count once


def test_the_interval_of_no_loss_is_one_sided():
    count = Count(3, 0, 0, None, 0, 20, 0, None, None, "a", 0.0, None, 0.0)
    assert count.interval() == Span(0.0, pytest.approx(1 - 0.025 ** (1 / 3)))
    assert count.show() == "0 of 3 sets [0 %, 71 %], 0 of 20 fits"


def test_collapse_deals_all_fits_and_shares_published_fusions_with_cross_lingual():
    options = CollapseOptions()
    cells = CollapseStudy.plan(options)
    for cooperative in {cell.labels["cooperative"] for cell in cells}:
        seeds = [
            seed
            for cell in cells
            if cell.labels["cooperative"] == cooperative
            for seed in cell.task.settings["seeds"]
        ]
        assert len(set(seeds)) == options.fits
        assert min(b - a for a, b in zip(sorted(seeds), sorted(seeds)[1:], strict=False)) > 3
    languages = {c.task.key for c in CrossLingualStudy.plan(CrossLingualOptions())}
    for cell in cells:
        is_shared = cell.task.needs[0].key in languages
        assert is_shared == ("published" in str(cell.labels["cooperative"]))
    assert len(CrossLingualOptions().languages) >= 6
    base = next(t for t in cells[0].task.walk() if t.action == "make-base")
    assert not any(domain.startswith("man-") for domain in base.settings["domains"])


def make_refits(cell: Cell, lost: Mapping[str, int]) -> dict[str, Any]:
    """What a refits task returns if the first fits of some routers lose a domain."""
    labels = AS_PUBLISHED if "published" in cell.name else ROUTERS
    routers = {}
    for label in labels:
        fits = []
        for number, seed in enumerate(cell.task.settings["seeds"]):
            nats = 0.4 if number < lost.get(label, 0) else 0.01
            good = {"excess": {"a": 0.0, "b": 0.01}, "gap": 0.0, "misrouted": []}
            wrong = {"excess": {"a": 0.0, "b": nats}, "misrouted": ["b"] if nats > 0.05 else []}
            fit = {**good, **wrong, "seed": seed}
            if label in cell.task.settings["guarded"]:
                fit["guarded"] = {**good, "attempts": 1, "replaced": False}
            fits.append(fit)
        is_seeded = label.startswith(("linear", "mlp", "hard"))
        routers[label] = {"is_seeded": is_seeded, "fits": fits}
    return {"domains": ["a", "b"], "routers": routers}


@pytest.mark.parametrize(
    ("lost", "verdicts"),
    [
        ({}, ["not decided", "not decided", "not decided", "not decided"]),
        (
            {"linear-noncausal": 2, "linear": 1},
            ["holds", "not decided", "not decided", "not decided"],
        ),
        (
            {"linear-noncausal": 2, "linear-noncausal-curriculum": 1, "statistics": 9},
            ["holds", "does not hold", "does not hold", "not decided"],
        ),
        (
            {"linear-noncausal": 1, "linear-noncausal-curriculum": 1},
            ["holds", "does not hold", "not decided", "not decided"],
        ),
    ],
)
def test_collapse_concludes_from_counts(lost, verdicts):
    options = CollapseOptions()
    results = {cell.name: make_refits(cell, lost) for cell in CollapseStudy.plan(options)}
    summary = CollapseStudy.summarise(options, results)
    assert [claim.verdict for claim in summary.claims] == verdicts
    assert all("set of specialists (3)" in claim.unit for claim in summary.claims)
    linear = summary.findings["cross-lingual"]["linear"]
    assert (linear["fits"], linear["sets"]) == (20, 3)  # refits are no replicates
    assert linear["lost_sets"] == (3 if lost.get("linear") else 0)
    assert summary.findings["cross-lingual"]["evidence"]["fits"] == 3
    assert len(summary.tables) == 3
    summary.figures[0].draw(Figure())


def test_cross_lingual_concludes_from_a_real_fusion(run: Run):
    options = CrossLingualOptions(seeds=(SEED,))
    results: dict[str, Mapping[str, Any]] = {}
    for form in ("ours", "as published"):
        fusion = plan_tiny(form, WITH_DEFAULT)
        results[f"{form} seed {SEED}"] = run(fusion).result
        results[f"{form}, mean"] = run(plan_mean(f"{form}, mean", [fusion])).result
    assert results.keys() == {cell.name for cell in CrossLingualStudy.plan(options)}
    summary = CrossLingualStudy.summarise(options, results)
    assert len(summary.claims) == 3
    assert summary.findings["divergence_percent"].keys() == {"birds-1", "birds-2", "tools"}
    assert summary.findings["excess_nats"]["ours"].keys() == WITH_DEFAULT.keys()
    table = summary.tables[0]
    assert {row[0] for row in table.rows} >= {*WITH_DEFAULT, "base", "domain_oracle"}
    summary.figures[0].draw(Figure())


@pytest.mark.parametrize(
    ("excess", "verdicts"),
    [(0.2, ("holds", "does not hold")), (0.01, ("not decided", "not decided"))],
)
def test_cross_lingual_tells_a_collapse_from_held_out_losses(run: Run, excess, verdicts):
    options = CrossLingualOptions(seeds=(SEED,))
    results = {}
    for form in ("ours", "as published"):
        fusion = plan_tiny(form, WITH_DEFAULT)
        result = dict(run(fusion).result)
        held_out = dict(result["held_out"])
        best = {
            d: min(each[d] for each in (*held_out["specialists"].values(), held_out["base"]))
            for d in held_out["domains"]
        }
        fused = {
            label: {d: nats + excess for d, nats in best.items()} for label in held_out["fused"]
        }
        result["held_out"] = {**held_out, "fused": fused}
        results[f"{form} seed {SEED}"] = result
        results[f"{form}, mean"] = run(plan_mean(f"{form}, mean", [fusion])).result
    summary = CrossLingualStudy.summarise(options, results)
    assert tuple(claim.verdict for claim in summary.claims[1:]) == verdicts


def test_six_languages_are_needed():
    with pytest.raises(ValueError, match="at least 6"):
        CrossLingualOptions(languages=("de", "fr"))
