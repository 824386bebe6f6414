"""Held-out figures from members' sums, beside the same blocks in one place."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from molora_kalavai.evidence import ZeroTrainingEvidenceRouter
from molora_kalavai.linear import LinearOptions, LinearRouter

from molora_fed.bank import CalibrationBank, HeldOutBank
from molora_fed.errors import BankError, MoloraError, RoutingError, SumError
from molora_fed.evaluation.evaluate import evaluate
from molora_fed.evaluation.moments import (
    MIN_CLUSTERS,
    Moments,
    add_by_domain,
    measure_moments,
)
from molora_fed.evaluation.summed import Compared, MemberSums, measure_alone, measure_sums
from molora_fed.evaluation.summed_report import SummedEvaluation, compose_loss_matrix
from molora_fed.fusion.texts import measure_loss_matrix
from molora_fed.testing import build_synthetic_bank, take_blocks

SCHEMA = json.loads((Path(__file__).parents[3] / "docs" / "report.schema.json").read_text())
ROWS = {"anna": range(36), "bea": range(36, 60), "bo": range(60, 72), "cleo": range(72, 108)}


def build_bank(kind=HeldOutBank, hardness=0.6):
    """Three domains of over 40 clusters of many sizes, some far harder than others."""
    bank = build_synthetic_bank(kind, blocks_per_domain=36, seed=3)
    clusters = np.empty(bank.clusters.shape, dtype=np.int64)
    for row in range(len(clusters)):
        clusters[row] = 2 * (row if row % 3 else row - row % 2)
        if row % 2 and row % 7:
            clusters[row, 9:] = 2 * row + 1
    drawn = np.random.default_rng(3).normal(0, hardness, clusters.max() + 1)
    easier = torch.tensor(drawn[clusters].clip(max=1.9), dtype=torch.float32)
    easier[:, 0] = 0.0
    return replace(
        bank,
        clusters=clusters,
        logprob=bank.logprob + easier[..., None],
        base_logprob=bank.base_logprob + easier,
    )


@pytest.fixture(scope="module")
def bank():
    return build_bank()


@pytest.fixture(scope="module")
def routers():
    options = LinearOptions(learning_rate=0.02)
    return {
        "evidence-zero": ZeroTrainingEvidenceRouter(3),
        "linear": LinearRouter.fit(build_synthetic_bank(), options, 0),
    }


def take_baselines(bank, rows=None):
    losses = {"weight_average": bank.base_nll() - 0.1, "wider": bank.base_nll() ** 1.1}
    return losses if rows is None else {n: nll[list(rows)] for n, nll in losses.items()}


@pytest.fixture(scope="module")
def compared(bank, routers):
    return Compared(bank.expert_names, tuple(routers), tuple(take_baselines(bank)))


@pytest.fixture(scope="module")
def answers(bank, routers, compared):
    """Two members share a domain; what they say goes through JSON."""
    found = []
    for who, rows in ROWS.items():
        own = take_blocks(bank, rows)
        said = measure_sums(own, routers, take_baselines(bank, rows), who=who)
        value = json.loads(json.dumps(said.to_json(), allow_nan=False))
        found.append(MemberSums.from_json(value, compared, domain=own.domains[0], who=who))
    return found


@pytest.fixture(scope="module")
def summed(compared, answers):
    return SummedEvaluation.add(compared, answers)


@pytest.fixture(scope="module")
def pooled(bank, routers):
    return evaluate(bank, routers, take_baselines(bank), seed=1)


def list_leaves(value, path=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from list_leaves(inner, (*path, key))
    else:
        yield path, value


def test_every_point_is_that_of_the_same_blocks_in_one_place(summed, pooled):
    found, expected = summed.to_json(), pooled.to_json()
    assert expected.keys() - found.keys() == {"excess_nats"}
    assert found.keys() - expected.keys() == {"interval_method", "sums"}
    assert found["baseline_gain_percent"].keys() == expected["baseline_gain_percent"].keys() - {
        "domain_oracle"
    }
    left_out = found["sums"]["left_out"]
    assert left_out.keys() == {"excess_nats", "baseline_gain_percent.domain_oracle"}
    leaves = dict(list_leaves(expected))
    compared = 0
    for path, value in list_leaves(found):
        if path[0] in ("interval_method", "sums") or path[-1] in ("low", "high"):
            continue
        compared += 1
        if isinstance(value, str):
            assert value == leaves[path]
        else:
            assert value == pytest.approx(leaves[path], abs=1e-9), path
    assert compared > 80


def test_intervals_are_as_wide_as_those_of_the_bootstrap(summed, pooled):
    found, expected = dict(list_leaves(summed.to_json())), dict(list_leaves(pooled.to_json()))
    assert min(summed.to_json()["sums"]["clusters"].values()) >= 20
    ends = [path[:-1] for path in found if path[-1] == "low"]
    assert len(ends) > 20
    for path in ends:
        low, high = (found[(*path, end)] for end in ("low", "high"))
        other_low, other_high = (expected[(*path, end)] for end in ("low", "high"))
        width = other_high - other_low
        assert high - low == pytest.approx(width, rel=0.25), path
        assert abs((low + high) - (other_low + other_high)) / 2 <= 0.25 * width, path


def test_a_gain_over_itself_is_nothing_and_has_no_interval(bank):
    better = replace(bank, base_logprob=bank.base_logprob + 2.0, _derived={})
    own = [(take_blocks(better, rows), who) for who, rows in ROWS.items()]
    said = [measure_sums(part, {}, who=who) for part, who in own]
    found = SummedEvaluation.add(Compared(bank.expert_names, ()), said).to_json()
    assert found["best_alone"]["name"] == "base"
    nothing = {"point": 0.0, "low": 0.0, "high": 0.0}
    assert found["baseline_gain_percent"]["base"]["vs_best_alone"] == nothing
    assert found["baseline_gain_percent"]["base"]["vs_best_specialist"]["low"] > 0


def test_the_result_is_valid_and_says_what_it_is_of(summed):
    found = summed.to_json()
    json.dumps(found, allow_nan=False)
    for part, value in found.items():
        jsonschema.validate(value, {"$defs": SCHEMA["$defs"], **SCHEMA["properties"][part]})
    assert found["interval_method"] == "Student's t by document cluster"
    assert found["sums"]["members"] == {"domain-0": 1, "domain-1": 2, "domain-2": 1}
    assert found["sums"]["tokens"] == dict.fromkeys(summed.by_domain, 36 * 23)


def test_a_control_is_compared_as_in_one_place(summed, pooled):
    for pair in (("fused:linear", "wider"), ("wider", "fused:linear")):
        found, expected = summed.difference(*pair), pooled.difference(*pair)
        assert found["point"] == pytest.approx(expected["point"], abs=1e-9)
        width = expected["high"] - expected["low"]
        assert found["high"] - found["low"] == pytest.approx(width, rel=0.25)
    assert summed.losses("wider") == pytest.approx(pooled.losses("wider"), abs=1e-9)
    with pytest.raises(SumError, match="'specialist:expert-0' with 'specialist:expert-1'"):
        summed.difference("specialist:expert-0", "specialist:expert-1")


def test_the_loss_matrix_is_that_of_the_same_blocks_in_one_place():
    bank = build_bank(CalibrationBank)
    own_domain = {name: f"domain-{index}" for index, name in enumerate(bank.expert_names)}
    expected = measure_loss_matrix(bank, own_domain)
    parts = []
    for who, rows in ROWS.items():
        own = take_blocks(bank, rows)
        value = json.loads(json.dumps(measure_alone(own, who=who).to_json()))
        alone = Compared(bank.expert_names, ()).alone
        parts.append((own.domains[0], Moments.from_json(value, alone, who=who)))
    found = compose_loss_matrix(parts, own_domain)
    assert (found.domains, found.own_domain) == (expected.domains, expected.own_domain)
    assert found.base == pytest.approx(expected.base, abs=1e-9)
    for name, losses in expected.specialists.items():
        assert found.specialists[name] == pytest.approx(losses, abs=1e-9)


def test_the_base_as_an_expert_is_said_once(bank, routers):
    names = ("base", *bank.expert_names[1:])
    with_base = replace(bank, expert_names=names, has_base_expert=True, _derived={})
    compared = Compared(names, tuple(routers))
    assert compared.alone == ("base", "specialist:expert-1", "specialist:expert-2")
    said = measure_sums(take_blocks(with_base, range(36)), routers, who="anna")
    again = MemberSums.from_json(said.to_json(), compared, domain="domain-0", who="anna")
    assert again == said
    assert measure_alone(take_blocks(with_base, range(36)), who="anna").columns.keys() == set(
        compared.alone
    )


def count_leaves(value):
    if isinstance(value, dict):
        return sum(map(count_leaves, value.values()))
    return len(value) if isinstance(value, list) else 1


def test_as_many_numbers_leave_as_are_promised_and_they_grow_with_the_pairs(compared, answers):
    assert {count_leaves(one.to_json()) for one in answers} == {compared.count_numbers()}

    def count(experts, routers):
        names = tuple(f"e{index}" for index in range(experts))
        return Compared(names, tuple(f"r{index}" for index in range(routers))).count_numbers()

    for routers in (1, 4):
        steps = np.diff([count(experts, routers) for experts in (10, 20, 30)])
        assert steps[0] == steps[1]
    steps = np.diff([count(20, routers) for routers in (1, 2, 3)])
    assert steps[0] == steps[1]


def test_no_figure_of_a_document_or_token_leaves(bank, answers):
    """Beside sums over at least four clusters, which are checked above, there is nothing."""
    said = set()
    for one in answers:
        value = one.to_json()
        said |= {abs(x) for sums in value["moments"]["columns"].values() for x in sums}
        said |= {x for sums in value["gates"].values() for x in sums}
    losses = [bank.base_nll(), *(bank.expert_nll(expert) for expert in range(3))]
    for nll in losses:
        for cluster in np.unique(bank.clusters[:, 1:]):
            own = nll.numpy()[bank.clusters[:, 1:] == cluster].astype(np.float64)
            assert float(own.sum()) not in said and float(own.sum() ** 2) not in said
        assert said.isdisjoint(nll.double().flatten().tolist())


def measure_few(clusters, experts=8):
    """Blocks of one domain with so many clusters, what is compared on them, and its sums."""
    bank = build_synthetic_bank(HeldOutBank, num_experts=experts, blocks_per_domain=36, seed=3)
    own = take_blocks(bank, range(36))
    drawn = np.random.default_rng(1).integers(clusters, size=36 - clusters)  # of several sizes
    owners = np.concatenate([np.arange(clusters), drawn])[:, None].repeat(24, axis=1)
    own = replace(own, clusters=owners, _derived={})
    generator = torch.Generator().manual_seed(1)
    baselines = {n: 3 + torch.rand((36, 23), generator=generator) for n in ("one", "two", "three")}
    routers = {"evidence-zero": ZeroTrainingEvidenceRouter(experts)}
    return own, routers, baselines, Compared(own.expert_names, tuple(routers), tuple(baselines))


def find_relation(moments, compared):
    """Weights of 1, n and the other methods whose sum is 0 for each document, and how nearly.

    What an attacker makes of the sums alone: products of columns, and their null space.
    """

    def multiply(one, other):
        a, b, apart = (moments.columns[n][1] for n in (one, other, f"{one} less {other}"))
        return (a + b - apart) / 2

    sums = [moments.columns[other] for other in compared.others]
    rows = [
        [moments.clusters, moments.tokens, *(total for total, _, _ in sums)],
        [moments.tokens, moments.squares, *(products for _, _, products in sums)],
    ]
    for one in compared.alone:
        total, _, products = moments.columns[one]
        rows.append([total, products, *(multiply(one, other) for other in compared.others)])
    table = np.array(rows)
    scale = np.linalg.norm(table, axis=0)
    _, singular, right = np.linalg.svd(table / scale)
    return right[-1] / scale, singular[-1] / singular[0]


def measure_relation(moments_of, relation, compared):
    counts, losses = moments_of
    columns = np.stack([np.ones_like(counts), counts, *(losses[o] for o in compared.others)])
    return np.abs(relation @ columns) / (np.abs(relation) @ np.abs(columns))


def test_fewer_documents_than_methods_could_be_tested_for_and_are_refused():
    own, routers, baselines, compared = measure_few(7)
    assert compared.min_clusters == len(compared.others) + 3 == 9
    found = evaluate(own, routers, baselines)
    losses = {name: found.sums[name] for name in compared.methods}
    more = {f"{a} less {b}": losses[a] - losses[b] for a, b in compared.pairs}
    moments = measure_moments(found.clusters.counts, {**losses, **more})
    relation, smallest = find_relation(moments, compared)
    assert smallest < 1e-10
    own_documents = measure_relation((found.clusters.counts, losses), relation, compared)
    others, _, their_baselines, _ = measure_few(9)
    other = evaluate(others, routers, their_baselines)
    strangers = measure_relation((other.clusters.counts, other.sums), relation, compared)
    assert own_documents.max() < 1e-6 < strangers.min()  # the attack works
    with pytest.raises(SumError, match="'anna': expected 9 document clusters at least"):
        measure_sums(own, routers, baselines, who="anna")
    with pytest.raises(SumError, match="'anna': expected 9 document clusters at least"):
        value = MemberSums("domain-0", moments, {"evidence-zero": (36 * 23.0, *[0.0] * 7)})
        MemberSums.from_json(value.to_json(), compared, domain="domain-0", who="anna")


def test_as_many_documents_as_are_asked_for_show_no_relation():
    own, routers, baselines, compared = measure_few(9)
    said = measure_sums(own, routers, baselines, who="anna")
    assert said.moments.clusters == compared.min_clusters
    assert find_relation(said.moments, compared)[1] > 1e-8


class Untouched(ZeroTrainingEvidenceRouter):
    def gates(self, view):
        raise AssertionError("measured")


def test_too_few_documents_are_refused_by_name_before_anything_is_measured(bank):
    few = take_blocks(bank, range(36))
    clusters = np.arange(36)[:, None].repeat(24, axis=1) % (MIN_CLUSTERS - 1)
    few = replace(few, clusters=clusters, _derived={})
    with pytest.raises(SumError, match="'anna': expected 6 document clusters at least"):
        measure_sums(few, {"x": Untouched(3)}, who="anna")
    with pytest.raises(SumError, match="'anna': expected 4 document clusters at least"):
        measure_alone(few, who="anna")


def test_blocks_of_several_domains_are_refused(bank, routers):
    with pytest.raises(SumError, match="'anna': expected blocks of one domain, got domain-0, dom"):
        measure_sums(bank, routers, who="anna")


def test_calibration_blocks_are_not_reported_from(routers):
    own = take_blocks(build_bank(CalibrationBank), range(36))
    with pytest.raises(BankError, match="HeldOutBank"):
        measure_sums(own, routers, who="anna")


class Boastful(ZeroTrainingEvidenceRouter):
    def bound_excess(self, num_experts):
        return -50.0


def test_a_broken_promise_is_said_without_the_figure_that_shows_it(bank):
    own = take_blocks(bank, range(36))
    with pytest.raises(RoutingError, match="router 'boastful' on the text of 'anna'") as caught:
        measure_sums(own, {"boastful": Boastful(3)}, who="anna")
    assert "\n" not in str(caught.value)
    assert not any(character.isdigit() for character in str(caught.value))
    assert "for every document" in str(caught.value.__cause__)


def test_nobody_s_answers_are_no_evaluation(compared):
    with pytest.raises(SumError, match="the answer of one member at least"):
        SummedEvaluation.add(compared, [])


def put(*path, to):
    def change(value):
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to

    return change


def drop(*path):
    def change(value):
        for key in path[:-1]:
            value = value[key]
        del value[path[-1]]

    return change


def shift(value):
    value["moments"]["columns"]["base less fused:linear"][0] += 5.0


def negate(value):
    columns = value["moments"]["columns"]
    columns["uniform"][0] *= -1
    columns["uniform"][2] *= -1


@pytest.mark.parametrize(
    "change",
    [
        drop("moments"), drop("gates"), put("moments", to=None), put("gates", to=[1]),
        put("gates", to={}), drop("gates", "linear"), put("gates", "another", to=[1.0, 2.0, 3.0]),
        put("gates", "linear", to=[1.0]), put("gates", "linear", to="abc"),
        put("gates", "linear", to=[276.0, 276.0, float("nan")]),
        put("gates", "linear", to=[276.0, 276.0, 10**400]),
        put("gates", "linear", to=[900.0, -72.0, 0.0]), put("gates", "linear", to=[1.0, 2.0, 3.0]),
        put("gates", "linear", to=["a\nb", 2.0, 3.0]),
        put("moments", "clusters", to=2), put("moments", "tokens", to=float("inf")),
        drop("moments", "columns", "uniform"), drop("moments", "columns", "base less uniform"),
        put("moments", "columns", "uniform", to=[1.0, 2.0]), shift, negate,
    ],
)  # fmt: skip
def test_answers_that_no_text_could_give_are_refused_in_one_line(compared, answers, change):
    value = copy.deepcopy(answers[0].to_json())
    change(value)
    with pytest.raises(SumError, match="of 'mallory'") as caught:
        MemberSums.from_json(value, compared, domain="domain-0", who="mallory")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, [], "x", 3, {"moments": {}, "gates": {}}])
def test_answers_of_another_form_are_refused(compared, value):
    with pytest.raises(SumError, match="of 'mallory'"):
        MemberSums.from_json(value, compared, domain="domain-0", who="mallory")


def test_refusals_are_failures_that_a_user_may_meet(compared):
    with pytest.raises(MoloraError):
        MemberSums.from_json({}, compared, domain="domain-0", who="mallory")


def test_domains_are_sorted_and_members_of_one_are_added(answers):
    found = add_by_domain([(one.domain, one.moments) for one in reversed(answers)])
    assert list(found) == ["domain-0", "domain-1", "domain-2"]
    both = [one.moments for one in answers if one.domain == "domain-1"]
    assert len(both) == 2 and found["domain-1"].clusters == sum(one.clusters for one in both)
