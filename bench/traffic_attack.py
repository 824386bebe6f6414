"""Attacks on what a coordinator is told: which document, and which tokens, a member's text has.

Everything an attacker has goes in as arrays. It is granted a lot: the experts, the rules by which
documents are counted, documents of the same domain that are not the member's, and the exact
figures of each candidate. `features` are what sums are said of: sizes, losses, their squares and
products, as in `molora_fed.evaluation.moments`.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = [
    "build_features",
    "guess_document",
    "match_tokens",
    "rank_tokens",
    "try_documents",
    "try_tokens",
    "try_total",
]

CANDIDATES = 10
"""Documents that an attacker chooses from; one is the member's."""
TRIALS = 400
DRAWS = 25
"""How often each document of a given total is shown among others."""
BANDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Tokens are compared with others whose probability to be there lies between the same two."""
_KEPT = 1e-9  # of the largest variance: directions with less are rounding


def _show_rate(right: int, tried: int) -> dict[str, float]:
    """A rate with Wilson's 95 % interval."""
    share, z = right / tried, float(stats.norm.ppf(0.975))
    middle = (share + z**2 / (2 * tried)) / (1 + z**2 / tried)
    half = z / (1 + z**2 / tried) * math.sqrt(share * (1 - share) / tried + z**2 / (4 * tried**2))
    return {"point": share, "low": middle - half, "high": middle + half, "tried": tried}


def _show_mean(areas: list[float]) -> dict[str, float]:
    """The mean of rates or areas with its 95 % interval, Student's."""
    width = float(stats.t.ppf(0.975, len(areas) - 1))
    half = width * float(np.std(areas, ddof=1)) / math.sqrt(len(areas))
    middle = float(np.mean(areas))
    return {"point": middle, "low": middle - half, "high": middle + half, "tried": len(areas)}


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
    centre, scale = reference.mean(axis=0), reference.std(axis=0)
    scale[scale == 0] = 1
    _, widths, axes = np.linalg.svd((reference - centre) / scale, full_matrices=False)
    kept = widths > widths[0] * _KEPT
    whiten = axes[kept].T / widths[kept]
    rest = (total - count * centre) / scale @ whiten
    own = (candidates - centre) / scale @ whiten
    # Without any candidate the density is the same for all of them.
    return int(np.argmin(((rest - own) ** 2).sum(axis=1)))


def try_documents(
    own: NDArray[Any], others: NDArray[Any], count: int, *, seed: int
) -> dict[str, dict[str, float]]:
    """Guess many times: documents are drawn, their features added, one of them shown among others.

    Args:
        own: Features of a member's documents that no model was trained on, (M, F), M > `count`.
        others: Of documents of the same domain that it does not have, (R, F).
        count: Documents in a total.
        seed: Of the draws.

    Returns:
        How often the guess from a total that holds the document is right ("told"), and from one
        of as many of the member's other documents, which is what chance is here ("chance").
    """
    draw = np.random.default_rng(seed)
    right = {"told": 0, "chance": 0}
    for _ in range(TRIALS):
        mine, order = draw.permutation(len(own)), draw.permutation(len(others))
        shown = np.concatenate([own[mine[:1]], others[order[: CANDIDATES - 1]]])
        mixed = draw.permutation(CANDIDATES)
        known = others[order[CANDIDATES - 1 :]]
        for name, first in (("told", 0), ("chance", 1)):
            total = own[mine[first : first + count]].sum(axis=0)
            guess = guess_document(total, count, shown[mixed], known)
            right[name] += int(mixed[guess] == 0)
    return {name: _show_rate(times, TRIALS) for name, times in right.items()}


def try_total(
    total: NDArray[Any],
    own: NDArray[Any],
    outside: NDArray[Any],
    others: NDArray[Any],
    *,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Guess from one total that is given: each document is shown several times among others.

    Args:
        total: Sum of the features of some documents, (F,).
        own: Features of these, (M, F).
        outside: Of documents of the same member that are not in it, (O, F).
        others: Of documents of the same domain that it does not have, (R, F).
        seed: Of the draws.

    Returns:
        How often the guess is right where one of the total's documents is shown ("told"), and
        where one of the member's others is ("chance"); 95 % intervals by document.
    """
    draw = np.random.default_rng(seed)
    rates: dict[str, list[float]] = {"told": [], "chance": []}
    for name, shown in (("told", own), ("chance", outside)):
        for document in shown:
            right = 0
            for _ in range(DRAWS):
                order, mixed = draw.permutation(len(others)), draw.permutation(CANDIDATES)
                candidates = np.vstack([document, others[order[: CANDIDATES - 1]]])[mixed]
                known = others[order[CANDIDATES - 1 :]]
                right += int(mixed[guess_document(total, len(own), candidates, known)] == 0)
            rates[name].append(right / DRAWS)
    return {name: _show_mean(found) for name, found in rates.items()}


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
    own: tuple[NDArray[Any], NDArray[Any]],
    others: tuple[NDArray[Any], NDArray[Any]],
    vocabulary: int,
    count: int,
    *,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Rank tokens by totals of a text: area under the curve of present against absent ones.

    Args:
        own: Predicted tokens (N, T-1) of a member's blocks, N >= 2 `count`, and their losses in
            each column (N, T-1, K), nats.
        others: The same of blocks of the same domain that it does not have.
        vocabulary: V.
        count: Blocks in a total.
        seed: Of the draws.

    Returns:
        Means over totals with 95 % intervals: of totals of the text ("told"), and of as many
        other blocks of the member, which is what chance is here ("chance"). Only tokens that text
        of the domain of that length has with a probability of 0.1 to 0.9 count, each compared with
        others of about its probability: which ones are likely is known without figures.
    """
    draw = np.random.default_rng(seed)
    flat, losses = others[0].reshape(-1), others[1].reshape(-1, others[1].shape[-1])
    seen = np.bincount(flat, minlength=vocabulary).astype(np.float64)
    mean = np.stack(
        [np.bincount(flat, one, vocabulary) / np.maximum(seen, 1) for one in losses.T], axis=1
    )
    spread = np.atleast_2d(np.cov((losses - mean[flat]).T))
    prior = seen / seen.sum()
    areas: dict[str, list[float]] = {"told": [], "chance": []}
    for _ in range(TRIALS // 4):
        order = draw.permutation(len(own[0]))
        tokens = own[0][order[:count]]
        there = np.bincount(tokens.reshape(-1), minlength=vocabulary) > 0
        bands = np.digitize(1 - np.exp(-prior * tokens.size), BANDS)
        mixed_bands = [
            band
            for band in range(1, len(BANDS))
            if 0 < there[bands == band].sum() < (bands == band).sum()
        ]
        for name, chosen in (("told", order[:count]), ("chance", order[count : 2 * count])):
            total = own[1][chosen].sum(axis=(0, 1))
            score = rank_tokens(total, tokens.size, mean, spread, prior)
            found = [_measure_area(score[bands == one], there[bands == one]) for one in mixed_bands]
            areas[name] += [float(np.mean(found))] if found else []
    return {name: _show_mean(found) for name, found in areas.items()}


def _measure_area(score: NDArray[Any], there: NDArray[np.bool_]) -> float:
    ranks = stats.rankdata(score)
    present, absent = int(there.sum()), int((~there).sum())
    return float((ranks[there].sum() - present * (present + 1) / 2) / (present * absent))
