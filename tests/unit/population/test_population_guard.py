import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from molora_fed.errors import PopulationError
from molora_fed.population.guard import compare_branches, spend_level


def draw(random, clusters, effect, spread=0.02, domains=2):
    """Sums of two branches; the lifecycle's loss is `effect` higher in the mean over domains."""
    counts = random.integers(20, 200, clusters * domains).astype(float)
    domain_of = np.repeat(np.arange(domains), clusters)
    twin = counts * random.normal(3.0, 0.5, len(counts))
    noise = random.normal(0.0, spread, len(counts))
    return twin + counts * (effect + noise), twin, counts, domain_of


def test_one_domain_of_equal_clusters_is_the_plain_t_bound():
    differences = np.array([0.01, -0.02, 0.015, 0.0, 0.03])
    counts = np.full(5, 50.0)
    found = compare_branches(
        differences * 50, np.zeros(5), counts, np.zeros(5, dtype=np.int64), delta=0.05
    )
    error = differences.std(ddof=1) / np.sqrt(5)
    assert found.difference == pytest.approx(differences.mean())
    assert found.error == pytest.approx(error)
    assert found.degrees == pytest.approx(4)
    assert found.bound == pytest.approx(differences.mean() + stats.t.ppf(0.95, 4) * error)
    assert found.kept and found.clusters == (5,)
    assert found.to_json()["kept"] is True


def test_domains_count_equally_whatever_their_tokens():
    lifecycle = np.array([1.0, 1.0, 0.0, 0.0])
    counts = np.array([1.0, 1.0, 1000.0, 1000.0])
    found = compare_branches(lifecycle, np.zeros(4), counts, np.array([0, 0, 1, 1]))
    assert found.difference == pytest.approx(0.5)


def test_harm_at_the_margin_is_kept_as_rarely_as_the_level_says():
    random = np.random.default_rng(0)
    kept = [compare_branches(*draw(random, 8, 0.002)).kept for _ in range(2000)]
    assert 0.03 < np.mean(kept) < 0.07


def test_clear_help_is_kept_and_clear_harm_is_not():
    random = np.random.default_rng(1)
    assert np.mean([compare_branches(*draw(random, 8, -0.03)).kept for _ in range(200)]) > 0.95
    assert np.mean([compare_branches(*draw(random, 8, 0.03)).kept for _ in range(200)]) < 0.01


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    clusters=st.integers(2, 9),
    shift=st.floats(-0.5, 0.5),
    level=st.floats(0.6, 0.99),
)
def test_the_bound_moves_with_the_harm_and_grows_with_the_level(seed, clusters, shift, level):
    lifecycle, twin, counts, domain_of = draw(np.random.default_rng(seed), clusters, 0.0)
    found = compare_branches(lifecycle, twin, counts, domain_of, level=level)
    moved = compare_branches(lifecycle + shift * counts, twin, counts, domain_of, level=level)
    assert moved.bound == pytest.approx(found.bound + shift, abs=1e-9)
    assert found.bound >= found.difference
    higher = compare_branches(lifecycle, twin, counts, domain_of, level=0.995)
    assert higher.bound >= found.bound


def test_equal_branches_are_kept_exactly():
    values, counts = np.arange(1.0, 7.0), np.ones(6)
    found = compare_branches(values, values, counts, np.array([0, 0, 0, 1, 1, 1]), delta=0.0)
    assert (found.difference, found.error, found.bound, found.kept) == (0.0, 0.0, 0.0, True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lifecycle": np.array([1.0, np.nan, 1.0, 1.0])}, "not finite"),
        ({"lifecycle": np.ones(3)}, r"shapes \[\(3,\), \(4,\)\]"),
        ({"level": 1.0}, "at level 1.0"),
        ({"domain_of": np.array([0, 0, 0, 1])}, "1 guard clusters of domain 'law'"),
        ({"domain_of": np.array([0, 0, 0, 0])}, "0 guard clusters of domain 'law'"),
        ({"domain_of": np.array([0, 0, 2, 2])}, "without a domain"),
    ],
)
def test_too_little_or_broken_guard_data_is_named(change, named):
    arguments = {
        "lifecycle": np.ones(4),
        "twin": np.ones(4),
        "counts": np.ones(4),
        "domain_of": np.array([0, 0, 1, 1]),
        "domains": ["art", "law"],
        **change,
    }
    with pytest.raises(PopulationError, match=named) as caught:
        compare_branches(**arguments)
    assert "\n" not in str(caught.value)


def test_spending_covers_every_branch_that_could_come_about():
    spent = sum(2**k * (1 - spend_level(0.95, 5, k)) for k in range(5))
    assert spent == pytest.approx(0.05)
