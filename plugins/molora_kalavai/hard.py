"""KALAVAI's hard router: the linear router's best expert alone."""

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from molora_fed.routing.top_k import keep_top_k
from molora_kalavai.linear import LinearRouter

__all__ = ["HardRouter"]


class HardRouter(LinearRouter):
    """One expert a position: the argmax of the linear router, which is fitted on soft gates.

    Argmax has no gradient, so W is that of `linear` under the same options and seed. All experts
    run, and the choice may change at every token.

    Source: arXiv 2603.22755, protocol; deviations as those of `linear`.
    """

    name: ClassVar[str] = "hard"

    @override
    def to_gates(self, scores: Tensor) -> Tensor:
        """1 for the best expert, 0 for the others."""
        return keep_top_k(torch.softmax(scores, dim=-1), 1)
