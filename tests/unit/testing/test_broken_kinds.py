"""The kits of a cooperative's hooks find what is wrong with broken plugins."""

import random
from dataclasses import replace

import pytest
import torch
from broken_plugins import (
    merge_in_place,
    merge_without_keywords,
    predict_by_falsifying,
    predict_nan,
    read_none,
    read_surrogates,
)
from pydantic import BaseModel, ConfigDict

from molora_fed.adapters.kinds import LoraKind, SvdKind
from molora_fed.adapters.updates import LinearUpdate
from molora_fed.contributions.admission import Stage, needs
from molora_fed.errors import PluginError
from molora_fed.routing.contract import OutputRouter
from molora_fed.testing import (
    build_outcome,
    check_adapter_kind_conformance,
    check_admission_check_conformance,
    check_domain_conformance,
    check_gain_predictor_conformance,
    check_merge_conformance,
    check_router_conformance,
    examine_admission_check,
    examine_merge,
    measure_router,
)
from molora_fed.testing.findings import CheckResult, Remark, examine
from molora_fed.types import Document, Finding, Forecast

# Gain predictors ----------------------------------------------------------------------------------


def claim(point=2.0, **changes):
    fields = {"low": point - 1, "high": point + 1, "level": 0.8, "note": "Made up.", **changes}
    return Forecast("best_alone", point, **fields)


def predict_too_surely(case, past):
    gain = build_outcome(case).gains["best_alone"] + 0.5
    return claim(gain, low=gain - 0.01, high=gain + 0.01, level=0.9)


def predict_by_past_alone(case, past):
    return claim(past[0].gains["best_alone"], low=-100, high=100)


def predict_by_chance(case, past):
    return claim(random.random(), low=-100, high=100)


@pytest.mark.parametrize(
    ("predictor", "reason"),
    [
        (predict_nan, "expected a Forecast or None, got ConfigError"),
        (predict_by_falsifying, "case and past as they were"),
        (predict_too_surely, "intervals of level 0.90 to hold at least .. of 60"),
        (predict_by_past_alone, "IndexError: tuple index out of range without any past"),
        (predict_by_chance, "same forecast from the same case"),
    ],
)
def test_a_broken_predictor_is_caught(predictor, reason):
    with pytest.raises(PluginError, match=reason):
        check_gain_predictor_conformance(predictor)


# Merges -------------------------------------------------------------------------------------------


def rebuild(adapters, updates, *parts):
    digest = f"{abs(hash(parts)):016x}" * 4
    return replace(adapters[0], name="merged", kind="delta", updates=updates, hash=digest)


def merge_factors(adapters, *, name, seed):
    """The mistake that docs/merges.md is about."""
    updates = {}
    for module, update in adapters[0].updates.items():
        if update.a is None:
            updates[module] = update
            continue
        others = [one.updates[module] for one in adapters if one.updates[module].a is not None]
        rank = min(one.rank for one in others)
        a = sum(one.a[:rank] for one in others) / len(others)
        b = sum(one.b[:, :rank] for one in others) / len(others)
        updates[module] = LinearUpdate(a=a, b=b)
    return rebuild(adapters, updates, *(one.hash for one in adapters))


def merge_by_chance(adapters, *, name, seed):
    updates = {
        module: LinearUpdate(dense=update.product() * torch.rand(()))
        for module, update in adapters[0].updates.items()
    }
    return rebuild(adapters, updates, seed, *(one.hash for one in adapters))


def merge_under_one_hash(adapters, *, name, seed):
    updates = {
        module: LinearUpdate(dense=update.product() / 2)
        for module, update in adapters[0].updates.items()
    }
    return rebuild(adapters, updates)


class MergeOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    factor: float = 1.0


class ScaledFirst:
    """A merge with options."""

    Options = MergeOptions

    def __init__(self, options):
        self.options = options

    def __call__(self, adapters, *, name, seed):
        updates = {
            module: LinearUpdate(dense=update.product() * self.options.factor)
            for module, update in adapters[0].updates.items()
        }
        return rebuild(adapters, updates, self.options.factor, adapters[0].hash)


@pytest.mark.parametrize(
    ("merge", "reason"),
    [
        (merge_factors, "merge products B@A, not factors"),
        (merge_by_chance, "same adapters and seed"),
        (merge_under_one_hash, "another hash"),
        (merge_in_place, "adapters as they were"),
        (merge_without_keywords, "TypeError"),
    ],
)
def test_a_broken_merge_is_caught(merge, reason):
    with pytest.raises(PluginError, match=reason):
        check_merge_conformance(merge)


def test_a_merge_may_be_a_class_with_options():
    check_merge_conformance(ScaledFirst)
    check_merge_conformance(ScaledFirst, MergeOptions(factor=0.5))
    broken = [each for each in examine_merge(ScaledFirst, MergeOptions(factor=float("nan")))]
    assert "expected a finite update" in str(broken[0].problem)


# Admission checks ---------------------------------------------------------------------------------


@needs(Stage.MANIFEST)
def check_too_early(candidate):
    return None if candidate.adapter.updates else Finding("updates", "none", "Train.")


def check_licence(candidate):
    candidate.contribution.manifest.training["steps"] / 1
    return None


def check_by_changing_the_base(candidate):
    with torch.no_grad():
        next(candidate.base.model.parameters()).add_(1)


def check_in_many_lines(candidate):
    return Finding("one\ntwo", "three", "Four.")


def check_that_quotes(candidate):
    note = candidate.contribution.manifest.training.get("note")
    return None if note is None else Finding("no note", note, "Leave it out.")


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (check_too_early, "Stage.MANIFEST to read the manifest alone, got a look at candidate.ad"),
        (check_licence, "KeyError: 'steps' of a contribution without a training record"),
        (check_by_changing_the_base, "changes of the base's weights"),
        (check_in_many_lines, "one line as 'expected'"),
        (check_that_quotes, "of a training record of other things"),
    ],
)
def test_a_broken_admission_check_is_caught(check, reason):
    with pytest.raises(PluginError, match=reason):
        check_admission_check_conformance(check)


def test_what_a_check_says_of_an_honest_contribution_is_told():
    first, *_ = examine_admission_check(lambda candidate: Finding("a licence", "none", "Name it."))
    assert first.problem is None
    assert first.remark == "expected a licence, got none. Name it."


# Domains ------------------------------------------------------------------------------------------


def read_in_any_order():
    documents = [Document(str(number), f"text {number}") for number in range(9)]
    random.shuffle(documents)
    return documents


def read_one_name_twice():
    return [Document("a", "text"), Document("a", "other")]


def read_emptiness():
    return [Document("a", "text"), Document("b", " \n")]


def read_rooted():
    return [Document("/texts/a.txt", "text")]


@pytest.mark.parametrize(
    ("domain", "reason"),
    [
        (read_in_any_order, "same order on two reads"),
        (read_one_name_twice, "a name of its own for every document, got 'a'"),
        (read_emptiness, "documents with text, got 1 without: 'b'"),
        (read_rooted, "names relative to the source"),
        (read_surrogates, "not Unicode"),
        (read_none, "TypeError"),
        (lambda: [], "got none: is its text on this machine"),
    ],
)
def test_a_broken_domain_is_caught(domain, reason):
    with pytest.raises(PluginError, match=reason):
        check_domain_conformance(domain)


# Adapter kinds ------------------------------------------------------------------------------------


class ForgetsTheScale(LoraKind):
    def load(self, folder, limits, **settings):
        adapter = super().load(folder, limits, **settings)
        updates = {name: replace(one, scale=1.0) for name, one in adapter.updates.items()}
        return replace(adapter, updates=updates)


class TrainsTheBase(SvdKind):
    def prepare(self, model, rules, rank, *, seed=0):
        super().prepare(model, rules, rank, seed=seed)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model, list(model.parameters())


class KnowsNoLimits(LoraKind):
    def load(self, folder, limits, **settings):
        return super().load(folder, None, **settings)


class StartsByChance(LoraKind):
    def prepare(self, model, rules, rank, *, seed=0):
        return super().prepare(model, rules, rank, seed=int(torch.randint(0, 999, ())))


class WritesNotes(LoraKind):
    def export(self, trained, base_model, folder, rank, rules, **settings):
        super().export(trained, base_model, folder, rank, rules, **settings)
        (folder / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ForgetsTheScale, "of the change lost on gpt_neox"),
        (TrainsTheBase, "expected the base as it was, got changes of"),
        (KnowsNoLimits, "AdapterError for more bytes than the rules allow, got Adapter"),
        (StartsByChance, "equal bytes from equal training"),
        (WritesNotes, "got notes.txt"),
    ],
)
def test_a_broken_adapter_kind_is_caught(kind, reason):
    with pytest.raises(PluginError, match=reason):
        check_adapter_kind_conformance(kind)


# Routers ------------------------------------------------------------------------------------------


class TakesTheWorst(OutputRouter):
    readings = frozenset({"evidence"})

    def scores(self, view):
        return -9 * view.evidence


class KnowsThree(TakesTheWorst):
    def scores(self, view):
        return torch.zeros_like(view.evidence)[..., :3]


class ReadsByChance(TakesTheWorst):
    @classmethod
    def reads(cls, options):
        raise KeyError("columns")


@pytest.mark.parametrize(
    ("router", "reason"),
    [
        (TakesTheWorst, "not above that of equal gates"),
        (KnowsThree, "with 16 experts"),
        (ReadsByChance, "columns that it reads, got KeyError: 'columns'"),
    ],
)
def test_a_broken_router_of_many_or_bad_gates_is_caught(router, reason):
    with pytest.raises(PluginError, match=reason):
        check_router_conformance(router)


class TakesMemory(TakesTheWorst):
    @classmethod
    def learn(cls, bank, options, seed, progress):
        for _ in range(3):  # one after the other: the peak is of one
            torch.zeros(2_000_000)
        return cls(bank.num_experts, options)


def test_a_cost_counts_tensors_that_live_together():
    plain, greedy = measure_router(TakesTheWorst), measure_router(TakesMemory)
    assert 8_000_000 <= greedy.peak_bytes < 12_000_000 > plain.peak_bytes
    assert plain.fit_seconds > 0 and plain.token_seconds > 0
    assert greedy.relative_to(greedy) == dict.fromkeys(vars(greedy), 1.0)


# Findings -----------------------------------------------------------------------------------------


def _leaves(case):
    raise SystemExit(3)


def _counts(case):
    return Remark("7 of 9")


def test_a_check_that_leaves_is_a_finding_and_a_remark_is_none():
    assert examine([_leaves, _counts], None) == (
        CheckResult("leaves", "expected 'leaves', got SystemExit: 3"),
        CheckResult("counts", None, "7 of 9"),
    )
