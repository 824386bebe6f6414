"""The attacks of the traffic test work where they should, and are at chance where nothing is told.

In `bench/`, where they are used, they are no package; loaded by path.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parents[3] / "bench"


@pytest.fixture(scope="module")
def attacks():
    """The module bench/traffic_attack.py."""
    spec = importlib.util.spec_from_file_location("traffic_attack", BENCH / "traffic_attack.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop(spec.name, None)


@pytest.fixture(scope="module")
def documents(attacks):
    """Features of a member's 60 documents and of 300 others of the same kind."""
    draw = np.random.default_rng(0)
    sizes = draw.integers(60, 140, 360)
    losses = sizes[:, None] * (3 + draw.normal(0, 0.3, (360, 1)) + draw.normal(0, 0.1, (360, 4)))
    features = attacks.build_features(sizes, losses)
    assert features.shape == (360, 2 + 3 * (4 + 6))
    return features[:60], features[60:]


def test_a_single_documents_figures_name_it(attacks, documents):
    found = attacks.try_documents(*documents, 1, seed=1)
    assert found["told"]["point"] > 0.99
    assert found["chance"]["low"] < 0.1 < found["chance"]["high"]


def test_the_more_documents_a_total_has_the_less_it_tells(attacks, documents):
    rates = [attacks.try_documents(*documents, n, seed=1)["told"]["point"] for n in (1, 2, 30)]
    assert rates[0] > rates[1] > rates[2]
    assert rates[2] < 0.3


def test_noise_in_place_of_a_total_is_at_chance(attacks, documents):
    own, others = documents
    draw = np.random.default_rng(2)
    right = 0
    for trial in range(300):
        noise = 4 * others.mean(axis=0) + draw.normal(size=own.shape[1]) * others.std(axis=0)
        shown = np.concatenate([own[trial % 60 : trial % 60 + 1], others[:9]])
        mixed = draw.permutation(10)
        right += mixed[attacks.guess_document(noise, 4, shown[mixed], others[9:])] == 0
    assert 10 < right < 60


def test_a_tokens_own_losses_name_it(attacks):
    draw = np.random.default_rng(3)
    possible = draw.gamma(2.0, size=(50, 200, 3))
    truth = draw.integers(0, 200, 50)
    figures = possible[np.arange(50), truth] + draw.normal(0, 1e-6, (50, 3))
    assert (attacks.match_tokens(figures, possible) == truth).all()


def test_tokens_are_ranked_by_what_they_cost(attacks):
    draw = np.random.default_rng(4)
    costs = draw.gamma(2.0, size=(40, 3))

    def write(blocks):
        tokens = draw.integers(0, 40, (blocks, 10))
        return tokens, costs[tokens] + draw.normal(0, 0.01, (blocks, 10, 3))

    found = attacks.try_tokens(write(60), write(400), 40, 1, seed=5)
    assert found["told"]["low"] > 0.53
    assert abs(found["chance"]["point"] - 0.5) < 0.05


def test_a_given_total_of_few_documents_names_one_of_them_and_no_other(attacks, documents):
    own, others = documents
    found = attacks.try_total(own[:2].sum(axis=0), own[:2], own[2:14], others, seed=6)
    assert found["told"]["point"] > 0.8
    assert found["told"]["tried"] == 2
    assert found["chance"]["point"] < 0.2
    many = attacks.try_total(own[:40].sum(axis=0), own[:12], own[40:], others, seed=6)
    assert many["told"]["point"] < 0.4
