"""Routes by the gates that contributors trained at home and signed with their contributions."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor

from molora_fed import (
    CalibrationBank,
    FitSetting,
    NoRounds,
    OutputRouter,
    Progress,
    RouterOptions,
    RouterView,
)
from molora_phatgoose.gate import normalise

__all__ = ["PhatgooseOptions", "PhatgooseRouter"]

CARRIED = "phatgoose-gate"


class PhatgooseOptions(RouterOptions):
    """Options of the router.

    Attributes:
        temperature: Scores are divided by it before the softmax.
        absent: Score of an expert that carries no gate, such as the base; the scores of the others
            are 0 on states that have nothing to do with them.
    """

    temperature: float = Field(default=1.0, gt=0)
    absent: float = 0.0


class PhatgooseRouter(OutputRouter[PhatgooseOptions]):
    """Gates softmax(v_e . h_t / sqrt(D)), both normalised; nothing is learned where it is fitted.

    Source: arXiv 2402.05859; there gates choose among adapters in every module, here among the
    experts' distributions.
    """

    readings = frozenset({"base_hidden"})

    @classmethod
    def shapes(
        cls, num_experts: int, options: PhatgooseOptions
    ) -> Mapping[str, tuple[int | str, ...]]:
        """Normalised gates (E, D), a row of zeros for who has none."""
        return {"gates_of": (num_experts, "D")}

    @classmethod
    def learn(
        cls, bank: CalibrationBank, options: PhatgooseOptions, seed: int, progress: Progress | None
    ) -> Self:
        """Take the gates that the contributions carry."""
        return cls(bank.num_experts, options, collect(bank.carried, bank.hidden_size))

    @classmethod
    def by_sums(cls, setting: FitSetting) -> NoRounds:
        """The same where text stays at home: nothing has to be asked of it."""
        tensors = collect(setting.carried, setting.hidden_size)
        return NoRounds(setting, setting.options, tensors)

    @classmethod
    def from_statistics(cls, statistics: Any, setting: FitSetting) -> Self:
        """The same where statistics are published, which it does not read."""
        tensors = collect(setting.carried, setting.hidden_size)
        return cls(setting.num_experts, cls.narrow(setting.options), tensors)

    def scores(self, view: RouterView) -> Tensor:
        """Scores of every position, (B, T, E)."""
        assert view.base_hidden is not None
        width = view.base_hidden.shape[-1]
        found = normalise(view.base_hidden) @ self.gates_of.T / width**0.5
        has_none = ~self.gates_of.any(-1)
        return torch.where(has_none, self.options.absent, found) / self.options.temperature


def collect(carried: Mapping[str, Any], width: int) -> dict[str, Tensor]:
    """The experts' gates with mean 0 and variance 1 each, by the name of the router's tensor.

    Args:
        carried: What each expert's contribution carries.
        width: D; a gate of another width counts as none.
    """
    rows = []
    for files in carried.values():
        tensors = files[CARRIED]
        gate = None if tensors is None else tensors.get("gate")
        is_usable = gate is not None and gate.shape == (width,) and bool(gate.any())
        rows.append(normalise(gate) if is_usable and gate is not None else torch.zeros(width))
    return {"gates_of": torch.stack(rows)}
