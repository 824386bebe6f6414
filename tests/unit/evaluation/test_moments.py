"""Sums over documents say as much as the documents do, where only sums matter."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora_fed.errors import SumError
from molora_fed.evaluation.moments import (
    MIN_CLUSTERS,
    Moments,
    build_stand_ins,
    measure_moments,
)
from molora_fed.population.contract import LossTable
from molora_fed.population.fitness import compute_effects
from molora_fed.population.guard import compare_branches

sizes = st.lists(st.integers(1, 5_000), min_size=MIN_CLUSTERS, max_size=12)
draws = st.integers(0, 2**32 - 1)


def draw_columns(counts, seed, names=("one", "two")):
    random = np.random.default_rng(seed)
    return {name: counts * random.normal(2.0, 1.0, len(counts)) for name in names}


@given(st.lists(st.tuples(sizes, draws), min_size=1, max_size=3))
def test_stand_ins_have_the_sums_of_the_real_clusters(domains):
    moments = []
    for found, seed in domains:
        counts = np.array(found, dtype=np.float64)
        moments.append(measure_moments(counts, draw_columns(counts, seed)))
    stand_ins = build_stand_ins(moments)
    assert (stand_ins.counts > 0).all()
    for index, own in enumerate(moments):
        chosen = stand_ins.domain_of == index
        columns = {name: column[chosen] for name, column in stand_ins.columns.items()}
        again = measure_moments(stand_ins.counts[chosen], columns)
        assert again.clusters == own.clusters
        np.testing.assert_allclose(
            [again.tokens, again.squares, *again.columns["one"], *again.columns["two"]],
            [own.tokens, own.squares, *own.columns["one"], *own.columns["two"]],
            rtol=1e-9, atol=1e-6,
        )  # fmt: skip


@given(sizes, sizes, draws)
def test_fitness_and_guard_come_out_as_on_the_real_clusters(first, second, seed):
    random = np.random.default_rng(seed)
    counts = np.array([*first, *second], dtype=np.float64)
    domain_of = np.repeat([0, 1], [len(first), len(second)])
    full = counts * random.uniform(1, 3, len(counts))
    without = full + counts * random.normal(0, 0.02, (3, len(counts)))
    base = counts * random.uniform(1, 3, len(counts))
    table = LossTable(("a", "b"), domain_of, counts, base, full, without, 4)
    moments = []
    for domain in (0, 1):
        own = domain_of == domain
        columns = {"base": base[own], "full": full[own]}
        columns |= {str(i): (row - full)[own] for i, row in enumerate(without)}
        value = json.loads(json.dumps(measure_moments(counts[own], columns).to_json()))
        moments.append(Moments.from_json(value, list(columns), who="anna"))
    found = build_stand_ins(moments)
    rebuilt = LossTable(
        ("a", "b"), found.domain_of, found.counts, found.columns["base"], found.columns["full"],
        np.stack([found.columns["full"] + found.columns[str(i)] for i in range(3)]), 4,
    )  # fmt: skip
    expected, got = compute_effects(table), compute_effects(rebuilt)
    for name in ("by_domain", "domain_errors", "total", "total_errors", "regret"):
        np.testing.assert_allclose(
            getattr(got, name), getattr(expected, name), rtol=1e-5, atol=1e-7
        )
    zeros = np.zeros_like(counts)
    real = compare_branches(without[0] - full, zeros, counts, domain_of)
    stand = compare_branches(
        found.columns["0"], np.zeros_like(found.counts), found.counts, found.domain_of
    )
    assert stand.bound == pytest.approx(real.bound, rel=1e-6, abs=1e-9)
    assert stand.clusters == real.clusters


@given(sizes, sizes, draws)
def test_contributors_add_up(first, second, seed):
    parts = []
    for found in (first, second):
        counts = np.array(found, dtype=np.float64)
        parts.append((counts, draw_columns(counts, seed)))
    (a, one), (b, two) = parts
    together = measure_moments(
        np.concatenate([a, b]), {n: np.concatenate([one[n], two[n]]) for n in one}
    )
    added = measure_moments(a, one).add(measure_moments(b, two))
    assert added.clusters == together.clusters
    for name in one:
        assert added.mean(name) == pytest.approx(together.mean(name), rel=1e-9)
        assert added.variance(name) == pytest.approx(together.variance(name), rel=1e-6, abs=1e-12)


def test_sums_over_so_few_clusters_that_they_tell_them_are_refused():
    few = np.array([3.0, 5.0, 7.0])
    with pytest.raises(SumError, match="4 document clusters at least"):
        measure_moments(few, {"x": few})


GOOD = measure_moments(np.array([3.0, 5.0, 7.0, 9.0]), {"x": np.array([1.0, 2.0, 4.0, 3.0])})


@pytest.mark.parametrize(
    "change",
    [
        {"clusters": 2}, {"clusters": True}, {"clusters": 10**400}, {"clusters": 10**9},
        {"clusters": 25},
        {"tokens": float("nan")},
        {"tokens": -1.0}, {"squares": 1.0}, {"squares": 1e9}, {"columns": {}}, {"columns": None},
        {"columns": {"x": [1.0, 2.0]}}, {"columns": {"x": [10.0, 1.0, 60.0]}},
        {"columns": {"x": [10.0, 30.0, 1e6]}}, {"columns": {"x": ["a", 1, 2]}},
        {"columns": {"x": [10.0, float("inf"), 60.0]}},
        {"columns": {"x": [1e200, 30.0, 60.0]}}, {"columns": {"x": [10.0, 1e300, 1e200]}},
        {"tokens": 1e200}, {"tokens": 1e160, "squares": 1e308},
    ],
)  # fmt: skip
def test_figures_that_no_clusters_could_have_are_refused_in_one_line(change):
    value = {**GOOD.to_json(), **change}
    with pytest.raises(SumError, match="figures of 'mallory'") as caught:
        Moments.from_json(value, ["x"], who="mallory")
    assert "\n" not in str(caught.value)
    assert Moments.from_json(GOOD.to_json(), ["x"], who="anna") == GOOD


@pytest.mark.parametrize("value", [None, [], "x", 3])
def test_figures_of_another_form_are_refused(value):
    with pytest.raises(SumError, match="figures of 'mallory'"):
        Moments.from_json(value, ["x"], who="mallory")
