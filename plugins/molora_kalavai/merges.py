"""TIES and DARE on what adapters do to the weights: PEFT's arithmetic on the product B@A.

PEFT merges the factors A and B one by one, which is not a merge of the differences B@A (see
docs/merges.md). As registered, density and scale are fixed beforehand; a study may choose them on
calibration text, never on the text that is reported.
"""

from collections.abc import Callable, Sequence

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, ties
from torch import Tensor

from molora_fed.adapters.updates import Adapter, merge_products
from molora_fed.errors import ConfigError
from molora_fed.storage.files import canonical_json, hash_bytes

__all__ = ["DARE_DENSITY", "TIES_DENSITY", "merge_dare", "merge_dare_ties", "merge_ties"]

TIES_DENSITY = 0.2
"""Share of each difference that is kept: the default of the TIES paper."""

DARE_DENSITY = 0.5
"""Share that is kept at random. The paper drops up to 0.9 of differences that are tiny against the
weights; those of short training at high rates are not, and the noise grows with (1 - d) / d."""


def merge_ties(
    adapters: Sequence[Adapter],
    *,
    name: str,
    seed: int,
    density: float = TIES_DENSITY,
    scale: float = 1.0,
) -> Adapter:
    """Trim to the largest values, elect a sign for every weight, average what agrees with it.

    Args:
        adapters: Adapters of one base; kinds and ranks may differ.
        name: Name of the result.
        seed: Unused: nothing is drawn.
        density: Share of each difference that is kept, in (0, 1].
        scale: Factor of the merged difference, > 0.

    Returns:
        A dense adapter of kind "delta".

    Raises:
        ConfigError: If density or scale is out of range.
        AdapterError: If there is no adapter.
        IncompatibleAdapterError: If shapes or base fingerprints differ.

    Source: arXiv 2306.01708, trimmed module by module as PEFT does.
    """
    _check(name, density, scale)

    def combine(differences: Sequence[Tensor], _which: str) -> Tensor:
        # Weights of 1: the mean over those that agree is taken inside.
        return scale * ties(list(differences), torch.ones(len(differences)), density)

    recipe = _describe(["ties", density], scale)
    return merge_products(adapters, combine, name=name, recipe=recipe)


def merge_dare(
    adapters: Sequence[Adapter],
    *,
    name: str,
    seed: int,
    density: float = DARE_DENSITY,
    scale: float = 1.0,
) -> Adapter:
    """Drop values at random, rescale the rest so that their mean stays, then average.

    Args:
        adapters: Adapters of one base; kinds and ranks may differ.
        name: Name of the result.
        seed: Of what is dropped.
        density: Share that is kept at random, in (0, 1].
        scale: Factor of the merged difference, > 0.

    Returns:
        A dense adapter of kind "delta".

    Raises:
        ConfigError: If density or scale is out of range.
        AdapterError: If there is no adapter.
        IncompatibleAdapterError: If shapes or base fingerprints differ.

    Source: arXiv 2311.03099, with equal weights that sum to 1.
    """
    _check(name, density, scale)

    def combine(differences: Sequence[Tensor]) -> Tensor:
        equal = torch.full((len(differences),), 1.0 / len(differences))
        return scale * dare_linear(list(differences), equal, density)

    return _merge_drawn(adapters, combine, name, ["dare", density, seed], scale)


def merge_dare_ties(
    adapters: Sequence[Adapter],
    *,
    name: str,
    seed: int,
    density: float = DARE_DENSITY,
    scale: float = 1.0,
) -> Adapter:
    """Drop values at random, rescale the rest, then merge by majority sign as TIES does.

    Args:
        adapters: Adapters of one base; kinds and ranks may differ.
        name: Name of the result.
        seed: Of what is dropped.
        density: Share that is kept at random, in (0, 1].
        scale: Factor of the merged difference, > 0.

    Returns:
        A dense adapter of kind "delta".

    Raises:
        ConfigError: If density or scale is out of range.
        AdapterError: If there is no adapter.
        IncompatibleAdapterError: If shapes or base fingerprints differ.

    Source: arXiv 2311.03099 with the merge of arXiv 2306.01708.
    """
    _check(name, density, scale)

    def combine(differences: Sequence[Tensor]) -> Tensor:
        return scale * dare_ties(list(differences), torch.ones(len(differences)), density)

    return _merge_drawn(adapters, combine, name, ["dare-ties", density, seed], scale)


def _check(name: str, density: float, scale: float) -> None:
    if not 0 < density <= 1 or not scale > 0:
        raise ConfigError(
            f"Cannot merge adapters into '{name}': expected a density in (0, 1] and a scale above "
            f"0, got {density:g} and {scale:g}. Correct them."
        )


def _describe(recipe: Sequence[str | float | int], scale: float) -> list[str | float | int]:
    """What decides a merge; a scale of 1 is left out, as it was before there was another."""
    return [*recipe] if scale == 1 else [*recipe, "scale", scale]


def _merge_drawn(
    adapters: Sequence[Adapter],
    combine: Callable[[Sequence[Tensor]], Tensor],
    name: str,
    recipe: Sequence[str | float | int],
    scale: float,
) -> Adapter:
    """Merge with draws that depend on the recipe and the weight's name, not on what ran before.

    The scale changes no draw.
    """

    def drawn(differences: Sequence[Tensor], which: str) -> Tensor:
        digest = hash_bytes(canonical_json([*recipe, which]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(digest[:15], 16))
            return combine(differences)

    return merge_products(adapters, drawn, name=name, recipe=_describe(recipe, scale))
