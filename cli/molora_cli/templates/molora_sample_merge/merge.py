"""The merge: one adapter made of several."""

from collections.abc import Sequence

import torch
from molora_fed import Adapter, Configurable, PluginOptions
from molora_fed.adapters import merge_products
from torch import Tensor


class SampleOptions(PluginOptions):
    """Options, set where the charter names the merge.

    Attributes:
        scale: Factor on the merged change.
    """

    scale: float = 1.0


class SampleMerge(Configurable[SampleOptions]):
    """Number by number the median of what the adapters change, the lower one of two."""

    def __call__(self, adapters: Sequence[Adapter], *, name: str, seed: int) -> Adapter:
        """Merge adapters into one: the one method to fill in, inside it `combine`.

        It works on the products `scale * B @ A`, the changes of the weights; a merge of the
        factors is another adapter's. The same adapters and seed give the same result.

        Args:
            adapters: Adapters of one base; kinds and ranks may differ.
            name: Name of the result.
            seed: Of whatever is drawn; this merge draws nothing.

        Returns:
            A dense adapter.

        See docs/hooks/merges.md, and docs/merges.md.
        """
        scale = self.options.scale

        def combine(differences: Sequence[Tensor], which: str) -> Tensor:
            """Changes of one weight, (D_out, D_in) each, or of one bias, (D_out,), to one."""
            return scale * torch.stack(list(differences)).median(dim=0).values

        # What decides the result beside the adapters; it decides the result's hash.
        recipe = ["sample-merge", scale]
        return merge_products(adapters, combine, name=name, recipe=recipe)
