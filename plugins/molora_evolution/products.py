"""Singular values of adapters' products, worked out on their factors, and factors from them.

An adapter is its product `scale * B @ A`; factors of the same product differ. So everything here
is defined on products, and computed in float64 at the cost of the ranks: the decomposition of a
product of rank R takes two QR decompositions of R columns and an SVD of (R, R), exactly.
"""

from typing import Any

import torch

from molora_fed.adapters.updates import LinearUpdate, Spectrum
from molora_fed.errors import PopulationError
from molora_fed.population.slots import make_fresh_updates

__all__ = ["decompose_product", "rebuild"]

SMALLEST_SHARE = 1e-7  # of the largest singular value: float32 factors hold no smaller one


def decompose_product(update: LinearUpdate, weight: float = 1.0) -> Spectrum:
    """Singular value decomposition of a low-rank product times a weight, without its zeros.

    Args:
        update: Low-rank update (D_out, D_in).
        weight: Factor of the product, not negative.

    Returns:
        The spectrum in float64: only singular values above rounding, so perhaps none.

    Raises:
        PopulationError: If the update is dense.
    """
    factors: Any = update
    if update.rank is None:
        raise PopulationError(
            "Cannot take an adapter's product apart: expected low-rank factors, got a dense "
            f"difference {tuple(update.shape)}. Make the population by make_population, which "
            "approximates dense updates."
        )
    left, left_core = torch.linalg.qr(factors.b.double() * (weight * update.scale))
    right, right_core = torch.linalg.qr(factors.a.double().T)
    u, values, vh = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    kept = int((values > SMALLEST_SHARE * values[:1]).sum())
    return Spectrum(left @ u[:, :kept], values[:kept], vh[:kept] @ right.T)


def rebuild(spectrum: Spectrum, rank: int, seed: int) -> LinearUpdate:
    """Factors of the best approximation of rank R, ready to be trained.

    Both factors carry the root of the singular values, as `truncate` does. Directions without a
    singular value get a fresh adapter's numbers, A random and B zero: with both zero they could
    never learn. So the product 0 becomes a fresh adapter. The scale is a fresh adapter's too,
    whatever the product, so that newborns of all kinds learn at one pace.

    Args:
        spectrum: Of the product, (D_out, D_in), falling.
        rank: R.
        seed: Of the fresh numbers.
    """
    fresh: Any = make_fresh_updates({"": spectrum.shape}, rank, seed)[""]
    kept = min(rank, len(spectrum.values))
    roots = (spectrum.values[:kept] / fresh.scale).sqrt()
    a, b = fresh.a.clone(), fresh.b.clone()
    a[:kept] = (roots[:, None] * spectrum.vh[:kept]).float()
    b[:, :kept] = (spectrum.u[:, :kept] * roots).float()
    return LinearUpdate(a=a, b=b, scale=fresh.scale)
