"""Cluster bootstrap: against a plain loop, and the size of its intervals."""

import numpy as np
import pytest

from molora_fed.errors import BankError
from molora_fed.evaluation.bootstrap import ClusterIndex, compute_interval, resample_domain_means


def make_index(blocks_per_cluster, domains=2, clusters=40, tokens=9, seed=0):
    """Blocks of one cluster each; every cluster has its own level."""
    generator = np.random.default_rng(seed)
    ids = np.repeat(np.arange(domains * clusters), blocks_per_cluster)
    levels = generator.normal(size=domains * clusters)
    values = levels[ids][:, None] + 0.01 * generator.normal(size=(len(ids), tokens - 1))
    index = ClusterIndex.build(np.repeat(ids[:, None], tokens, axis=1), ids // clusters)
    return index, values.astype(np.float32)


def test_sums_and_means_are_by_cluster_and_domain():
    clusters = np.array([[5, 5, 7], [9, 9, 9], [7, 7, 5]])
    index = ClusterIndex.build(clusters, np.array([0, 1, 0]))
    values = np.array([[1, 2], [3, 5], [10, 20]], dtype=np.float32)
    assert index.sum(values).tolist() == [21, 12, 8]
    assert index.counts.tolist() == [2, 2, 2]
    assert index.domain_means(index.sum(values)).tolist() == [33 / 4, 4]


def test_a_cluster_in_two_domains_is_refused():
    with pytest.raises(BankError, match="got 1 in several"):
        ClusterIndex.build(np.array([[1, 1], [1, 1]]), np.array([0, 1]))


@pytest.mark.parametrize("blocks_per_cluster", [2, [1, 2, 3, 1, 2, 5] * 2])
def test_resamples_of_clusters_of_any_size_match_a_plain_loop(blocks_per_cluster):
    index, values = make_index(blocks_per_cluster, clusters=6)
    sums = index.sum(values)
    means = resample_domain_means(index, [sums, sums * 2], seed=3, resamples=50)
    generator = np.random.default_rng(3)
    expected = np.empty((50, 2))
    for domain in range(2):
        own = np.flatnonzero(index.domain_of == domain)
        for row, draws in enumerate(generator.multinomial(6, np.full(6, 1 / 6), size=50)):
            picked = np.repeat(own, draws)
            expected[row, domain] = sums[picked].sum() / index.counts[picked].sum()
    np.testing.assert_allclose(means[:, 0], expected)
    np.testing.assert_allclose(means[:, 1], 2 * expected)


def test_parts_give_the_same_draws(monkeypatch):
    index, values = make_index(1)
    whole = resample_domain_means(index, [index.sum(values)], seed=1, resamples=100)
    monkeypatch.setattr("molora_fed.evaluation.bootstrap._DRAWS_AT_ONCE", 40 * 7)
    parts = resample_domain_means(index, [index.sum(values)], seed=1, resamples=100)
    np.testing.assert_array_equal(whole, parts)


@pytest.mark.parametrize("blocks_per_cluster", [1, 8])
def test_width_follows_clusters_not_tokens(blocks_per_cluster):
    index, values = make_index(blocks_per_cluster)
    means = resample_domain_means(index, [index.sum(values)], seed=0).mean(axis=2)[:, 0]
    low, high = compute_interval(means)
    error = np.sqrt(1 / 40 / 2)  # of the mean of two domains of 40 independent levels each
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.25)
    assert low < index.domain_means(index.sum(values)).mean() < high


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = 0
    for seed in range(200):
        index, values = make_index(1, seed=seed)
        means = resample_domain_means(index, [index.sum(values)], seed=seed, resamples=400)
        low, high = compute_interval(means.mean(axis=2)[:, 0])
        covered += low <= 0 <= high
    assert 0.88 <= covered / 200 <= 0.98
