"""Routers on hidden states fitted by sums: one gradient a round, and momentum where they meet."""

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from molora_fed.models.runtime import limit_threads
from molora_fed.routing.contract import OutputRouter, RouterOptions
from molora_fed.routing.summed import (
    Finished,
    FitSetting,
    SumEntry,
    SummedFit,
    SummedState,
    locate_domains,
)
from molora_fed.storage.seeds import derive_seed
from molora_kalavai.second_order import LEAST_LOGPROB, compute_token_losses

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = ["GradientSums"]

_ROUNDS = 12
_REACH = 0.5  # how far a number may move, of how far all steps of the pooled fit would move it
_FIRST, _SECOND = 0.6, 0.9  # what moments of the gradient keep from round to round
_LARGEST_SLOPE = 1e4  # of a sum of gradients, which is clipped there
_TINY = 1e-12
_CHUNK_NUMBERS = 2**20  # numbers of the features handled at once


class GradientSums(SummedFit[RouterOptions]):
    """Members send loss and gradient; Adam steps are made of the totals.

    Text of one domain would pull every member's own steps towards its expert, so that members make
    none: each round is one step on all of the text. As far as AdamW goes in `steps` steps at
    `learning_rate`, half of it is open here. Kept is the point of the lowest loss.

    Attributes:
        restarts: Further fits from other starts.
    """

    uses_seed = True

    def __init__(
        self, setting: FitSetting, options: RouterOptions, *, distance: float, restarts: int
    ) -> None:
        super().__init__(setting, options)
        self.rounds = _ROUNDS * (restarts + 1)
        self._rate = _REACH * distance / _ROUNDS

    @abc.abstractmethod
    def draw(self, seed: int) -> Mapping[str, Tensor]:
        """What is learned, before the first step."""

    @abc.abstractmethod
    def features(self, bank: "CalibrationBank") -> Tensor:
        """What scores are computed from, (N, T, D)."""

    @abc.abstractmethod
    def make(self, tensors: Mapping[str, Tensor]) -> OutputRouter:
        """A router of what is learned."""

    @abc.abstractmethod
    def score(self, router: OutputRouter, features: Tensor) -> Tensor:
        """Scores (B, T, E) of features of B blocks, differentiable in what the router learned."""

    @override
    def start(self) -> SummedState:
        return self._begin(0)

    def _begin(self, run: int) -> dict[str, Tensor]:
        seed = self.setting.seed if run == 0 else derive_seed(self.setting.seed, run)
        drawn = self.draw(seed)
        nothing = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in drawn.items()}
        return {
            **_under("at", {name: tensor.double() for name, tensor in drawn.items()}),
            **_under("first", nothing),
            **_under("second", nothing),
            "round": torch.zeros(()),
            "run": torch.tensor(run),
        }

    @override
    def send(self, state: SummedState) -> SummedState:
        return _under("at", {n: t.float() for n, t in _part(state, "at").items()})

    @override
    def entries(self, state: SummedState) -> dict[str, SumEntry]:
        shapes = {name: tuple(tensor.shape) for name, tensor in _part(state, "at").items()}
        gradients = {f"gradient.{n}": SumEntry(s, _LARGEST_SLOPE) for n, s in shapes.items()}
        return {"loss": SumEntry((), -LEAST_LOGPROB), **gradients}

    @override
    def measure(
        self, bank: "CalibrationBank", state: SummedState, weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        domains, features = self.setting.domains, self.features(bank)
        by_block = torch.tensor([weights.get(d, 0.0) for d in domains], dtype=torch.float64)
        by_block = by_block[locate_domains(bank, domains)].to(bank.device)
        router = self.make(_part(state, "at")).double().to(bank.device)
        learned = dict(router.named_parameters())
        for parameter in learned.values():
            parameter.requires_grad_(True)
        sums = {name: torch.zeros_like(parameter) for name, parameter in learned.items()}
        total = torch.zeros((), dtype=torch.float64)
        chunk = max(1, _CHUNK_NUMBERS // features[0].numel())
        with limit_threads(1):  # the same sums whatever the machine has
            for start in range(0, bank.num_blocks, chunk):
                rows = slice(start, min(start + chunk, bank.num_blocks))
                scores = self.score(router, features[rows].to(bank.device).double())
                losses = compute_token_losses(bank, scores, rows)
                loss = losses.sum(dim=1) @ by_block[rows]
                gradients = torch.autograd.grad(loss, list(learned.values()))
                for own, gradient in zip(sums.values(), gradients, strict=True):
                    own += gradient
                total += loss.detach().cpu()
        clipped = {n: s.clamp(-_LARGEST_SLOPE, _LARGEST_SLOPE).cpu() for n, s in sums.items()}
        return {"loss": total, **_under("gradient", clipped)}

    @override
    def advance(self, state: SummedState, totals: Mapping[str, Tensor]) -> SummedState | Finished:
        done = int(state["round"]) + 1
        at, gradient = _part(state, "at"), _part(totals, "gradient")
        best = _part(state, "best") or at
        best_loss = state.get("best_loss", totals["loss"])
        if float(totals["loss"]) < float(best_loss):
            best, best_loss = at, totals["loss"]
        kept = {**_under("best", best), "best_loss": best_loss}
        run = int(state["run"])
        if done == _ROUNDS and (run + 1) * _ROUNDS == self.rounds:
            return Finished({name: tensor.float() for name, tensor in best.items()})
        if done == _ROUNDS:
            return {**self._begin(run + 1), **kept}
        old_first, old_second = _part(state, "first"), _part(state, "second")
        first = {n: _FIRST * old_first[n] + (1 - _FIRST) * g for n, g in gradient.items()}
        second = {n: _SECOND * old_second[n] + (1 - _SECOND) * g**2 for n, g in gradient.items()}
        # Both moments begin at 0 and are short of their mean by these shares.
        missing, missing_second = 1 - _FIRST**done, 1 - _SECOND**done
        steps = {
            name: self._rate * (mean / missing) / ((second[name] / missing_second).sqrt() + _TINY)
            for name, mean in first.items()
        }
        return {
            **_under("at", {name: tensor - steps[name] for name, tensor in at.items()}),
            **_under("first", first),
            **_under("second", second),
            **kept,
            "round": torch.tensor(float(done)),
            "run": state["run"],
        }


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors that `_under` put under a prefix."""
    start = f"{prefix}."
    return {n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}
