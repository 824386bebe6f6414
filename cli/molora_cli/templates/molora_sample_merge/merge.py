"""The merge: one adapter made of several."""

from collections.abc import Sequence

import torch
from molora_fed import Adapter
from molora_fed.adapters import merge_products
from torch import Tensor


def merge(adapters: Sequence[Adapter], *, name: str, seed: int) -> Adapter:
    """Merge adapters into one: the one function to fill in, inside it `combine`.

    It works on the products `scale * B @ A`, the changes of the weights; a merge of the factors
    is another adapter's. The same adapters and seed give the same result.

    Args:
        adapters: Adapters of one base; kinds and ranks may differ.
        name: Name of the result.
        seed: Of whatever is drawn; this merge draws nothing.

    Returns:
        A dense adapter.

    See docs/hooks/merges.md, and docs/merges.md.
    """

    def combine(differences: Sequence[Tensor], which: str) -> Tensor:
        """Changes of one weight, (D_out, D_in) each, or of one bias, (D_out,), to one change."""
        return torch.stack(list(differences)).quantile(0.5, dim=0)

    # What decides the result beside the adapters; it decides the result's hash.
    recipe = ["sample-merge"]
    return merge_products(adapters, combine, name=name, recipe=recipe)
