"""A gate of every token by itself: nothing of the text before it is kept."""

from collections.abc import Mapping
from typing import Self

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import layer_norm

from molora_fed import (
    CalibrationBank,
    OutputRouter,
    Progress,
    RouterOptions,
    RouterView,
    fit_on_batches,
)

__all__ = ["TokenOptions", "TokenRouter"]


class TokenOptions(RouterOptions):
    """Options of the gate.

    Attributes:
        units: H, hidden units.
        steps: AdamW steps.
        batch: Blocks per step.
        learning_rate: Of AdamW.
    """

    units: int = Field(default=64, ge=1)
    steps: int = Field(default=500, ge=1)
    batch: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)


class TokenRouter(OutputRouter[TokenOptions]):
    """Gates softmax(V relu(U h_t) + c), h_t the base's normalised state after token t alone.

    Source: learned gates of single tokens over independently trained adapters, arXiv 2603.15965.
    There the gate chooses which adapter runs inside the model; here it weighs the experts'
    distributions, which the charter's `top_k = 1` turns into the choice of one.
    """

    readings = frozenset({"base_hidden"})

    @classmethod
    def shapes(cls, num_experts: int, options: TokenOptions) -> Mapping[str, tuple[int | str, ...]]:
        """U (H, D), V (E, H) and c (E,)."""
        return {
            "inner": (options.units, "D"),
            "outer": (num_experts, options.units),
            "bias": (num_experts,),
        }

    @classmethod
    def learn(
        cls, bank: CalibrationBank, options: TokenOptions, seed: int, progress: Progress | None
    ) -> Self:
        """Fit on the bank's losses; U begins at random numbers, V and c at zero."""
        generator = torch.Generator().manual_seed(seed)
        inner = torch.randn(options.units, bank.hidden_size, generator=generator)
        start = {
            "inner": inner * bank.hidden_size**-0.5,
            "outer": torch.zeros(bank.num_experts, options.units),
            "bias": torch.zeros(bank.num_experts),
        }
        router = cls(bank.num_experts, options, start).to(bank.device)
        fit_on_batches(
            bank,
            bank.derive("molora-tokens", normalise),
            list(router.parameters()),
            router.score_states,
            steps=options.steps,
            batch=options.batch,
            learning_rate=options.learning_rate,
            seed=seed,
            progress=progress,
        )
        return router

    def score_states(self, states: Tensor) -> Tensor:
        """Scores (..., E) of normalised states (..., D)."""
        return torch.relu(states @ self.inner.T) @ self.outer.T + self.bias

    def scores(self, view: RouterView) -> Tensor:
        """Scores of every position, (B, T, E)."""
        return self.score_states(normalise(view))


def normalise(view: RouterView) -> Tensor:
    """The base's states with mean 0 and variance 1 each, (B, T, D) float32."""
    assert view.base_hidden is not None
    return layer_norm(view.base_hidden.float(), view.base_hidden.shape[-1:])
