"""TIES and DARE on what adapters do to the weights: PEFT's arithmetic on the product B@A.

PEFT merges the factors A and B one by one, which is not a merge of the differences B@A (see
docs/merges.md). A charter, or a study on calibration text, may choose other densities and scales;
never on the text that is reported.
"""

from collections.abc import Callable, Sequence

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, ties
from pydantic import Field
from torch import Tensor

from molora_fed import Adapter, Configurable, PluginOptions
from molora_fed.adapters import merge_products
from molora_fed.storage.files import canonical_json, hash_bytes

__all__ = ["DareMerge", "DareOptions", "DareTiesMerge", "TiesMerge", "TiesOptions"]


class TiesOptions(PluginOptions):
    """Options of TIES.

    Attributes:
        density: Share of each difference that is kept; the default is the paper's.
        scale: Factor of the merged difference.
    """

    density: float = Field(default=0.2, gt=0, le=1)
    scale: float = Field(default=1.0, gt=0)


class DareOptions(PluginOptions):
    """Options of DARE.

    Attributes:
        density: Share that is kept at random. The paper drops up to 0.9 of differences that are
            tiny against the weights; those of short training at high rates are not, and the noise
            grows with (1 - d) / d.
        scale: Factor of the merged difference.
    """

    density: float = Field(default=0.5, gt=0, le=1)
    scale: float = Field(default=1.0, gt=0)


class TiesMerge(Configurable[TiesOptions]):
    """Trim to the largest values, elect a sign for every weight, average what agrees with it.

    Source: arXiv 2306.01708, trimmed module by module as PEFT does.
    """

    def __call__(self, adapters: Sequence[Adapter], *, name: str, seed: int) -> Adapter:
        """Merge.

        Args:
            adapters: Adapters of one base; kinds and ranks may differ.
            name: Name of the result.
            seed: Unused: nothing is drawn.

        Returns:
            A dense adapter of kind "delta".

        Raises:
            AdapterError: If there is no adapter.
            IncompatibleAdapterError: If shapes or base fingerprints differ.
        """
        density, scale = self.options.density, self.options.scale

        def combine(differences: Sequence[Tensor], _which: str) -> Tensor:
            # Weights of 1: the mean over those that agree is taken inside.
            return scale * ties(list(differences), torch.ones(len(differences)), density)

        recipe = _describe(["ties", density], scale)
        return merge_products(adapters, combine, name=name, recipe=recipe)


class DareMerge(Configurable[DareOptions]):
    """Drop values at random, rescale the rest so that their mean stays, then average.

    Source: arXiv 2311.03099, with equal weights that sum to 1.
    """

    def __call__(self, adapters: Sequence[Adapter], *, name: str, seed: int) -> Adapter:
        """Merge; see `TiesMerge`, but that `seed` is of what is dropped."""

        def combine(differences: Sequence[Tensor]) -> Tensor:
            equal = torch.full((len(differences),), 1.0 / len(differences))
            return dare_linear(list(differences), equal, self.options.density)

        return _merge_drawn("dare", adapters, combine, self.options, name, seed)


class DareTiesMerge(Configurable[DareOptions]):
    """Drop values at random, rescale the rest, then merge by majority sign as TIES does.

    Source: arXiv 2311.03099 with the merge of arXiv 2306.01708.
    """

    def __call__(self, adapters: Sequence[Adapter], *, name: str, seed: int) -> Adapter:
        """Merge; see `TiesMerge`, but that `seed` is of what is dropped."""

        def combine(differences: Sequence[Tensor]) -> Tensor:
            return dare_ties(list(differences), torch.ones(len(differences)), self.options.density)

        return _merge_drawn("dare-ties", adapters, combine, self.options, name, seed)


def _describe(recipe: Sequence[str | float | int], scale: float) -> list[str | float | int]:
    """What decides a merge; a scale of 1 is left out, as it was before there was another."""
    return [*recipe] if scale == 1 else [*recipe, "scale", scale]


def _merge_drawn(
    method: str,
    adapters: Sequence[Adapter],
    combine: Callable[[Sequence[Tensor]], Tensor],
    options: DareOptions,
    name: str,
    seed: int,
) -> Adapter:
    """Merge with draws that depend on density, seed and the weight's name, not on what ran before.

    The scale changes no draw.
    """
    recipe: list[str | float | int] = [method, options.density, seed]

    def drawn(differences: Sequence[Tensor], which: str) -> Tensor:
        digest = hash_bytes(canonical_json([*recipe, which]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(digest[:15], 16))
            return options.scale * combine(differences)

    return merge_products(adapters, drawn, name=name, recipe=_describe(recipe, options.scale))
