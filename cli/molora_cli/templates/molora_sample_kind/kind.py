"""The adapter kind: how a specialist is trained, written and read back."""

from typing import Any

import torch
from molora_fed.adapters.contract import LinearOptions
from molora_fed.adapters.kinds import LoraKind
from molora_fed.charter import AdapterRules
from pydantic import Field
from torch import nn


class SampleOptions(LinearOptions):
    """Options, set where the charter names the kind; `targets` and others are inherited.

    Attributes:
        spread: Factor on the random numbers of A, which stay as they are, unitless.
    """

    spread: float = Field(default=1.0, gt=0, allow_inf_nan=False)


class SampleKind(LoraKind):
    """Low-rank factors of which only B is trained; A stays as it was drawn.

    Source: arXiv 2308.03303.
    """

    name = "sample-kind"
    Options = SampleOptions
    options: SampleOptions
    narrow_learning_rate = 8e-3
    width_power = 1.0

    @torch.no_grad()
    def prepare(
        self, model: Any, rules: AdapterRules, rank: int, *, seed: int = 0
    ) -> tuple[Any, list[nn.Parameter]]:
        """Make a model that can be trained beside the base: the one method to fill in.

        `export` and `load`, inherited here, write what was trained and read it back as updates
        `scale * b @ a` of linear layers, a (R, D_in) and b (D_out, R).

        Args:
            model: The base model, which stays as it is.
            rules: The charter's rules: the first `frozen_depth` blocks are not changed.
            rank: R.
            seed: Of random initial factors.

        Returns:
            The model to train, whose logits are the base's before the first step, and the
            parameters to train in a fixed order.

        Raises:
            AdapterError: If rank or frozen depth are against rules or base.

        See docs/hooks/adapter-kinds.md, and docs/adapters.md.
        """
        trained, _ = super().prepare(model, rules, rank, seed=seed)
        for name, parameter in trained.named_parameters():
            if ".lora_A." in name:
                parameter.mul_(self.options.spread).requires_grad_(False)
        return trained, [p for p in trained.parameters() if p.requires_grad]
