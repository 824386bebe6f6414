from dataclasses import replace

import numpy as np
import pytest
from adaptation_helpers import build_counting_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import PopulationError
from molora_fed.population.losses import list_clusters
from molora_fed.population.split import Part, Shares, carve_blocks, join_domains
from molora_fed.types import Split


def build_packed(domain, seed, clusters=60, length=16):
    """Documents of uneven length laid end to end, so that most blocks hold several clusters."""
    random = np.random.default_rng(seed)
    lengths = random.integers(4, 40, clusters)
    owners = np.repeat(np.arange(clusters), lengths)
    rows = len(owners) // length
    owners = owners[: rows * length].reshape(rows, length).astype(np.int32)
    tokens = random.integers(0, 200, owners.shape).astype(np.int32)
    return Blocks(domain, Split.CALIBRATION, tokens, owners, owners // 2)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), draws=st.integers(0, 3))
def test_no_text_is_on_two_sides(seed, draws):
    blocks = [build_packed("art", seed), build_packed("law", seed + 1)]
    carved = carve_blocks(blocks, draws=draws, seed=seed)
    assert carved.domains == ("art", "law") and len(carved.guard) == draws
    for index, own in enumerate(blocks):
        parts = [carved.fitness, *carved.guard]
        measured = [set(part.clusters[index].tolist()) for part in parts]
        trained = set(np.unique(carved.adaptation[index].clusters).tolist())
        sides = [trained, *measured]
        for one in range(len(sides)):
            for other in range(one):
                assert not sides[one] & sides[other]
        assert set().union(*measured) <= set(list_clusters(own).tolist())
        for part, wanted in zip(parts, measured, strict=True):
            found = part.blocks[index].clusters[:, 1:]
            whole = own.clusters[:, 1:]
            for cluster in wanted:  # every predicted token of theirs is measured
                assert (found == cluster).sum() == (whole == cluster).sum()
    assert len(carved.fitness.counts()) == sum(
        len(list_clusters(own)) for own in carved.fitness.blocks
    )


def test_shares_are_near_what_was_asked():
    own = build_packed("art", 3, clusters=400)
    carved = carve_blocks([own], draws=2, seed=0, shares=Shares(0.6, 0.2, 0.2))
    sizes = [
        np.isin(own.clusters[:, 1:], part.clusters[0]).mean()
        for part in (carved.fitness, *carved.guard)
    ]
    assert sizes == pytest.approx([0.2, 0.1, 0.1], abs=0.03)


def test_a_whole_part_counts_everything():
    own = build_packed("art", 3)
    assert Part.whole([own]).counts().all()
    assert len(Part.whole([own]).counts()) == len(list_clusters(own))


def test_the_same_seed_deals_alike():
    own = build_packed("art", 3)
    first, again, other = (carve_blocks([own], draws=1, seed=s) for s in (1, 1, 2))
    assert first.adaptation[0].fingerprint == again.adaptation[0].fingerprint
    assert first.adaptation[0].fingerprint != other.adaptation[0].fingerprint


def test_contributors_of_one_domain_are_joined_with_clusters_apart():
    one, two = build_packed("law", 1, clusters=10), build_packed("law", 2, clusters=10)
    art = build_packed("art", 3, clusters=10)
    joined = join_domains([one, art, two])
    assert [own.domain for own in joined] == ["art", "law"]
    law = joined[1]
    assert len(law) == len(one) + len(two)
    assert len(list_clusters(law)) == len(list_clusters(one)) + len(list_clusters(two))
    assert not set(law.documents[: len(one)].ravel()) & set(law.documents[len(one) :].ravel())


def test_too_little_text_is_named():
    own = build_counting_blocks("up", count=3)
    with pytest.raises(PopulationError, match=r"clusters of 'up' for guard sample 2.*spending"):
        carve_blocks([own], draws=4, seed=0)
    merged = replace(own, clusters=np.zeros_like(own.clusters))
    with pytest.raises(PopulationError, match="0 clusters of 'up' for fitness"):
        carve_blocks([merged], draws=0, seed=0)
    with pytest.raises(PopulationError, match="got no domain"):
        carve_blocks([], draws=1, seed=0)
    with pytest.raises(PopulationError, match="expected positive shares"):
        carve_blocks([own], draws=1, seed=0, shares=Shares(1.0, 0.0, 0.5))
