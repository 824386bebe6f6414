"""Carving one sample of text into what adapts, what measures fitness, and what guards.

Whole clusters of near-duplicate documents are dealt, so that no text is on two sides. A block may
hold tokens of several clusters: fitness and guard run every block that has some of theirs and count
those tokens only, while adaptation takes blocks that are wholly its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import PopulationError
from molora_fed.population.guard import MIN_CLUSTERS
from molora_fed.population.losses import list_clusters

__all__ = ["Carved", "Part", "Shares", "carve_blocks", "join_domains"]


@dataclass(frozen=True)
class Shares:
    """How tokens are shared out; parts of their sum.

    Attributes:
        adaptation: What adapters and router are trained on.
        fitness: What slots are judged on.
        guard: What decides whether a lifecycle is kept.
    """

    adaptation: float = 0.5
    fitness: float = 0.25
    guard: float = 0.25


@dataclass(frozen=True, eq=False)
class Part:
    """Blocks to measure on, and the clusters in them that count.

    Attributes:
        blocks: One per domain.
        clusters: Clusters that count, of each domain.
    """

    blocks: tuple[Blocks, ...]
    clusters: tuple[NDArray[np.int32], ...]

    @staticmethod
    def whole(blocks: Sequence[Blocks]) -> "Part":
        """All clusters of blocks that are of no other part, one list a domain."""
        return Part(tuple(blocks), tuple(list_clusters(own) for own in blocks))

    def counts(self) -> NDArray[np.bool_]:
        """Which of all the blocks' clusters count, domain after domain, (C,)."""
        pairs = zip(self.blocks, self.clusters, strict=True)
        return np.concatenate([np.isin(list_clusters(b), chosen) for b, chosen in pairs])


@dataclass(frozen=True, eq=False)
class Carved:
    """A sample carved up.

    Attributes:
        domains: Domain names, sorted.
        adaptation: Blocks of each domain to train on.
        fitness: What fitness is measured on, the same in every generation.
        guard: What each comparison is made on, disjoint.
    """

    domains: tuple[str, ...]
    adaptation: tuple[Blocks, ...]
    fitness: Part
    guard: tuple[Part, ...]


def join_domains(parts: Sequence[Blocks]) -> tuple[Blocks, ...]:
    """One list of blocks a domain, sorted by name; clusters of different parts stay apart.

    Args:
        parts: Blocks of contributors, several of one domain or not, in a fixed order.
    """
    joined = []
    for domain in sorted({part.domain for part in parts}):
        own = [part for part in parts if part.domain == domain]
        arrays = {
            "tokens": [part.tokens for part in own],
            "documents": _shift([part.documents for part in own]),
            "clusters": _shift([part.clusters for part in own]),
        }
        stacked = {name: np.concatenate(values) for name, values in arrays.items()}
        joined.append(Blocks(domain, own[0].split, **stacked))
    return tuple(joined)


def _shift(parts: Sequence[NDArray[np.int32]]) -> list[NDArray[np.int32]]:
    """Contributors number on their own: shifted, none share a number."""
    shifted, offset = [], 0
    for part in parts:
        shifted.append((part - part.min(initial=0) + offset).astype(np.int32))
        offset = int(shifted[-1].max(initial=offset)) + 1
    return shifted


def carve_blocks(
    blocks: Sequence[Blocks], *, draws: int, seed: int, shares: Shares | None = None
) -> Carved:
    """Deal clusters in a random order to the part that lacks most of its share of tokens.

    Args:
        blocks: One per domain, e.g. from `join_domains`.
        draws: Disjoint guard samples; 0 for no guard, whose share then goes to the others.
        seed: Of the order.
        shares: How tokens are shared out.

    Raises:
        PopulationError: If a share is not positive, or a domain has too few clusters: fitness and
            every guard sample need two, adaptation a whole block.
    """
    shares = shares or Shares()
    if min(shares.adaptation, shares.fitness, shares.guard) <= 0 or draws < 0:
        raise PopulationError(
            f"Cannot carve data: expected positive shares, got {shares} for {draws} guard samples. "
            "Correct the shares."
        )
    weights = [
        shares.adaptation,
        shares.fitness,
        *([shares.guard / draws] * draws if draws else []),
    ]
    dealt = [_deal(own, np.array(weights), seed, index) for index, own in enumerate(blocks)]
    adaptation = [_take_whole(own, parts[0]) for own, parts in zip(blocks, dealt, strict=True)]
    measured = [
        Part(
            tuple(_take_some(own, parts[place]) for own, parts in zip(blocks, dealt, strict=True)),
            tuple(parts[place] for parts in dealt),
        )
        for place in range(1, len(weights))
    ]
    carved = Carved(
        domains=tuple(own.domain for own in blocks),
        adaptation=tuple(adaptation),
        fitness=measured[0],
        guard=tuple(measured[1:]),
    )
    _check(carved)
    return carved


def _deal(
    blocks: Blocks, weights: NDArray[np.float64], seed: int, index: int
) -> list[NDArray[np.int32]]:
    """Clusters of each part, sorted."""
    clusters, sizes = np.unique(blocks.clusters[:, 1:], return_counts=True)
    order = np.random.default_rng([seed, index]).permutation(len(clusters))
    wanted = weights / weights.sum() * sizes.sum()
    given = np.zeros(len(weights))
    owner = np.empty(len(clusters), dtype=np.int64)
    for place in order:
        # The first of those that lack the largest share of what they want.
        owner[place] = int(np.argmin(given / wanted))
        given[owner[place]] += sizes[place]
    return [clusters[owner == part] for part in range(len(weights))]


def _take_whole(blocks: Blocks, clusters: NDArray[np.int32]) -> Blocks:
    """Blocks all of whose tokens are of these clusters."""
    return _select(blocks, np.flatnonzero(np.isin(blocks.clusters, clusters).all(axis=1)))


def _take_some(blocks: Blocks, clusters: NDArray[np.int32]) -> Blocks:
    """Blocks that predict a token of these clusters."""
    rows = np.flatnonzero(np.isin(blocks.clusters[:, 1:], clusters).any(axis=1))
    return _select(blocks, rows)


def _select(blocks: Blocks, rows: NDArray[np.int64]) -> Blocks:
    return Blocks(
        blocks.domain,
        blocks.split,
        blocks.tokens[rows],
        blocks.documents[rows],
        blocks.clusters[rows],
    )


def _check(carved: Carved) -> None:
    """Refuse parts that nothing can be measured or trained on; all are named."""
    faults = [] if carved.domains else ["no domain"]
    faults += [f"no block of '{own.domain}' to adapt on" for own in carved.adaptation if not own]
    named = [("fitness", carved.fitness)]
    named += [(f"guard sample {number}", part) for number, part in enumerate(carved.guard, 1)]
    for what, part in named:
        faults += [
            f"{len(clusters)} clusters of '{domain}' for {what}"
            for domain, clusters in zip(carved.domains, part.clusters, strict=True)
            if len(clusters) < MIN_CLUSTERS
        ]
    if faults:
        more = f"; and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise PopulationError(
            f"Cannot carve data for a population: expected blocks to adapt on and {MIN_CLUSTERS} "
            f"document clusters in each other part, got {'; '.join(faults[:4])}{more}. Ask for "
            "more calibration blocks, evolve fewer generations, or use guard 'spending'."
        )
