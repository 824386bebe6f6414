"""Attacks on what a coordinator is told: which document, and which tokens, a member's text has.

Everything an attacker has goes in as arrays. It is granted a lot: the experts, the rules by which
documents are counted, documents of the same domain that are not the member's, and the exact
figures of each candidate. `features` are what sums are said of: sizes, losses, their squares and
products, as in `molora_fed.evaluation.moments`.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = [
    "Rate",
    "build_features",
    "guess_document",
    "match_tokens",
    "rank_tokens",
    "try_documents",
    "try_tokens",
]

CANDIDATES = 10
"""Documents that an attacker chooses from; one is the member's."""
TRIALS = 400
_KEPT = 1e-9  # of the largest variance: directions with less are rounding


@dataclass(frozen=True)
class Rate:
    """How often an attacker was right.

    Attributes:
        right: Times.
        tried: Times.
        chance: Rate without any figures.
    """

    right: float
    tried: int
    chance: float

    def to_json(self) -> dict[str, float]:
        """With Wilson's 95 % interval."""
        share, z = self.right / self.tried, stats.norm.ppf(0.975)
        middle = (share + z**2 / (2 * self.tried)) / (1 + z**2 / self.tried)
        half = z / (1 + z**2 / self.tried)
        half *= math.sqrt(share * (1 - share) / self.tried + z**2 / (4 * self.tried**2))
        return {
            "rate": share, "low": middle - half, "high": middle + half,
            "tried": self.tried, "chance": self.chance,
        }  # fmt: skip


def build_features(sizes: NDArray[Any], losses: NDArray[Any]) -> NDArray[np.float64]:
    """What of a document is added up: n, n^2, and x, x^2, x n of every column; and differences.

    Args:
        sizes: Predicted tokens n of each document, (M,).
        losses: Sums of losses x of each document in each column, (M, K) nats.

    Returns:
        Features, (M, 2 + 3 (K + K (K - 1) / 2)): of the columns and of the difference of any two.
    """
    n, x = np.asarray(sizes, np.float64)[:, None], np.asarray(losses, np.float64)
    one, other = np.triu_indices(x.shape[1], 1)
    columns = np.concatenate([x, x[:, one] - x[:, other]], axis=1)
    return np.concatenate([n, n**2, columns, columns**2, columns * n], axis=1)


def guess_document(
    total: NDArray[Any], count: int, candidates: NDArray[Any], reference: NDArray[Any]
) -> int:
    """Which candidate is the likeliest to be among the documents of a total.

    The ratio of two normal densities of the total: with the candidate in it, and without. Mean and
    covariance are of the reference, in the directions in which it varies.

    Args:
        total: Sum of the features of some documents, (F,).
        count: How many these are.
        candidates: Features, (M, F).
        reference: Features of other documents of the same kind, (R, F), R > 2.

    Returns:
        Index of a candidate.
    """
    centre = reference.mean(axis=0)
    scale = reference.std(axis=0)
    scale[scale == 0] = 1
    _, widths, axes = np.linalg.svd((reference - centre) / scale, full_matrices=False)
    kept = widths > max(widths[0] * _KEPT, 0)
    whiten = (axes[kept] / widths[kept, None]).T * math.sqrt(len(reference) - 1)
    rest = ((total - count * centre) / scale) @ whiten  # of `count` documents, each of unit variance
    own = ((candidates - centre) / scale) @ whiten
    if count == 1:
        return int(np.argmin(((rest - own) ** 2).sum(axis=1)))
    return int(np.argmin(((rest - own) ** 2).sum(axis=1) / (count - 1)))


def try_documents(features: NDArray[Any], count: int, *, seed: int) -> Rate:
    """Guess many times: documents are drawn, their features added, one of them shown among others.

    Args:
        features: Of documents of one domain, none of which a model was trained on, (M, F).
        count: Documents in a total.
        seed: Of the draws.
    """
    draw = np.random.default_rng(seed)
    right = 0
    for _ in range(TRIALS):
        order = draw.permutation(len(features))
        inside, others = order[:count], order[count : count + CANDIDATES - 1]
        shown = draw.permutation([inside[0], *others])
        guess = guess_document(
            features[inside].sum(axis=0),
            count,
            features[shown],
            features[order[count + CANDIDATES - 1 :]],
        )
        right += shown[guess] == inside[0]
    return Rate(right, TRIALS, 1 / CANDIDATES)


def match_tokens(figures: NDArray[Any], possible: NDArray[Any]) -> NDArray[np.int64]:
    """The token whose losses are nearest to the figures, where each position has its own.

    Args:
        figures: Losses of one token under every expert, (P, E) nats.
        possible: Losses of every token of the vocabulary there, (P, V, E) nats.

    Returns:
        Token ids, (P,).
    """
    gaps = np.abs(possible - figures[:, None, :]).sum(axis=-1)
    return np.asarray(gaps.argmin(axis=1), dtype=np.int64)


def rank_tokens(
    total: NDArray[Any], tokens: float, losses: NDArray[Any], spread: NDArray[Any], prior: Any
) -> NDArray[np.float64]:
    """How much a total speaks for each token: how far it moves the token's expected count.

    Counts are normal with the prior's mean and Poisson's variance; a total is what they cost, with
    what losses of a token vary by context as noise.

    Args:
        total: Sum of losses over a text in each column, (K,) nats.
        tokens: Tokens of the text.
        losses: Mean loss of each token in each column, (V, K) nats.
        spread: Covariance of the losses of a token around that mean, (K, K).
        prior: Share of each token in text of the domain, (V,).

    Returns:
        Change of each count in its prior standard deviations, (V,).
    """
    counts = tokens * np.asarray(prior, np.float64) + 1e-9
    matrix = losses.T * counts @ losses + tokens * spread
    matrix += np.eye(len(matrix)) * np.trace(matrix) * 1e-12
    moved = np.linalg.solve(matrix, total - counts @ losses)
    return np.asarray(np.sqrt(counts) * (losses @ moved), dtype=np.float64)


def try_tokens(
    tokens: NDArray[Any], losses: NDArray[Any], vocabulary: int, parts: int, *, seed: int
) -> dict[str, float]:
    """Rank tokens by totals of a text: area under the curve of present against absent ones.

    Half of the blocks are the member's, the others are the reference.

    Args:
        tokens: Predicted tokens, (N, T-1).
        losses: Of each in each column, (N, T-1, K) nats.
        vocabulary: V.
        parts: Blocks in a total.
        seed: Of the draws.

    Returns:
        Mean over totals with a 95 % interval by total, and chance. Only tokens that the reference
        has as likely present as absent count, between 0.1 and 0.9 for a total's length.
    """
    draw = np.random.default_rng(seed)
    areas = []
    for _ in range(40):
        order = draw.permutation(len(tokens))
        known, rest = order[: len(order) // 2], order[len(order) // 2 :]
        flat, loss = tokens[known].reshape(-1), losses[known].reshape(-1, losses.shape[-1])
        seen = np.bincount(flat, minlength=vocabulary).astype(np.float64)
        mean = np.stack(
            [np.bincount(flat, one, vocabulary) / np.maximum(seen, 1) for one in loss.T], axis=1
        )
        spread = np.cov((loss - mean[flat]).T)
        prior = seen / seen.sum()
        for start in range(0, len(rest) - parts + 1, parts):
            chosen = rest[start : start + parts]
            there = np.bincount(tokens[chosen].reshape(-1), minlength=vocabulary) > 0
            length = tokens[chosen].size
            expected = 1 - np.exp(-prior * length)
            open_ones = (expected > 0.1) & (expected < 0.9)
            if not there[open_ones].any() or there[open_ones].all():
                continue
            score = rank_tokens(
                losses[chosen].sum(axis=(0, 1)), length, mean, np.atleast_2d(spread), prior
            )
            areas.append(_measure_area(score[open_ones], there[open_ones]))
            break  # one total a draw: the draws overlap as it is
    found = np.array(areas)
    half = 1.96 * found.std(ddof=1) / math.sqrt(len(found))
    middle = float(found.mean())
    return {
        "area": middle, "low": middle - half, "high": middle + half,
        "tried": len(found), "chance": 0.5,
    }  # fmt: skip


def _measure_area(score: NDArray[Any], there: NDArray[np.bool_]) -> float:
    ranks = stats.rankdata(score)
    present, absent = int(there.sum()), int((~there).sum())
    return float((ranks[there].sum() - present * (present + 1) / 2) / (present * absent))
