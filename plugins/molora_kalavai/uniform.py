"""The same gate for every expert: what routing has to beat."""

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from molora_fed.bank.views import RouterView
from molora_fed.routing.contract import OutputRouter, RouterOptions

__all__ = ["UniformRouter"]


class UniformRouter(OutputRouter[RouterOptions]):
    """Gates 1/E, the base included where it is an expert. Nothing is read or learned.

    Source: arXiv 2603.22755, table of routers.
    """

    name: ClassVar[str] = "uniform"

    @override
    def scores(self, view: RouterView) -> Tensor:
        starts = view.document_starts
        return torch.zeros(*starts.shape, self.num_experts, device=starts.device)
