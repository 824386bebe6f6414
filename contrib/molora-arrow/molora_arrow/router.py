"""Routes by the adapters alone: how far a state lies along the direction each one reads most."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor

from molora_fed import (
    CalibrationBank,
    FitSetting,
    InputNorm,
    MoloraError,
    NoRounds,
    OutputRouter,
    Progress,
    RouterOptions,
    RouterView,
)
from molora_fed.adapters import decompose_update

__all__ = ["ArrowError", "ArrowOptions", "ArrowRouter", "read_directions"]


class ArrowError(MoloraError):
    """The adapters change nothing that reads a state which a router sees."""


class ArrowOptions(RouterOptions):
    """How sharp gates are.

    Attributes:
        sharpness: Scores are multiplied by it before the softmax.
    """

    sharpness: float = Field(default=1.0, gt=0)


class ArrowRouter(OutputRouter[ArrowOptions]):
    """Gates softmax(mean over modules of |v . x|), v an adapter's first right singular vector.

    x is what the module reads of the state that enters block K. An expert without an adapter, the
    base, scores what the others do on average. Source: Arrow, arXiv 2405.11157, which routes in
    every module among adapters; here one score weighs the experts' distributions.
    """

    readings = frozenset({"prefix_hidden"})

    @classmethod
    def shapes(cls, num_experts: int, options: ArrowOptions) -> Mapping[str, tuple[int | str, ...]]:
        """Directions in M modules; the norm's form is its epsilon, and 1 where it is centred."""
        return {
            "directions": (num_experts, "M", "D"),
            "weight": ("D",),
            "bias": ("D",),
            "form": (2,),
        }

    @classmethod
    def learn(
        cls, bank: CalibrationBank, options: ArrowOptions, seed: int, progress: Progress | None
    ) -> Self:
        """Take the directions of the adapters; of the text nothing is read."""
        return cls(bank.num_experts, options, read_directions(bank.adapters))

    @classmethod
    def by_sums(cls, setting: FitSetting) -> NoRounds:
        """The same where text stays at home: nothing has to be asked of it."""
        return NoRounds(setting, setting.options, read_directions(setting.adapters))

    @classmethod
    def from_statistics(cls, statistics: Any, setting: FitSetting) -> Self:
        """The same where statistics are published, which it does not read."""
        options = cls.narrow(setting.options)
        return cls(setting.num_experts, options, read_directions(setting.adapters))

    def scores(self, view: RouterView) -> Tensor:
        """Scores of every position, (B, T, E)."""
        assert view.prefix_hidden is not None
        norm = InputNorm(self.weight, self.bias, float(self.form[0]), bool(self.form[1]))
        read = norm(view.prefix_hidden)
        along = torch.einsum("btd,emd->btem", read, self.directions.to(read.device)).abs().mean(-1)
        has_one = self.directions.flatten(1).any(-1).to(read.device)
        if not bool(has_one.all()) and bool(has_one.any()):
            average = along[..., has_one].mean(-1, keepdim=True)
            along = torch.where(has_one, along, average)
        return self.options.sharpness * along


def read_directions(adapters: Any) -> dict[str, Tensor]:
    """The router's tensors: first right singular vectors, zeros where an expert changes nothing.

    Args:
        adapters: `bank.adapters` or `setting.adapters`.

    Raises:
        ArrowError: If no module reads the state that enters block K through a norm.
    """
    entry = adapters.entry
    if entry.norm is None or not entry.modules:
        raise ArrowError(
            "Cannot route by adapters: expected linear layers that read what enters block K "
            f"through a norm, got none in '{entry.block}'. Use another router for this base."
        )
    norm, found = entry.norm, []
    for adapter in adapters.values():
        updates = {} if adapter is None else adapter.updates
        rows = [
            decompose_update(updates[name]).vh[0]
            if name in updates
            else torch.zeros_like(norm.weight)
            for name in entry.modules
        ]
        found.append(torch.stack(rows))
    return {
        "directions": torch.stack(found),
        "weight": norm.weight,
        "bias": norm.bias,
        "form": torch.tensor([norm.epsilon, float(norm.is_centred)]),
    }
