"""Few numbers fitted by sums: damped Newton steps over members' losses, gradients and Hessians.

The coordinator proposes points, members answer with loss, gradient and Hessian at each, and the
next points are steps of several dampings from the best one seen; see docs/routers.md.
"""

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from molora_fed.bank.mixture import compute_probability_nll
from molora_fed.models.runtime import limit_threads
from molora_fed.routing.summed import (
    Finished,
    OptionsT,
    SumEntry,
    SummedFit,
    SummedState,
    locate_domains,
)

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = ["SecondOrderFit", "spread_evenly"]

LEAST_LOGPROB = -100.0
"""Nats; what an expert gives a token less than counts as this much, so that sums are bounded."""

_TRIED = ((1.0, 0.0), (2.0, 0.0), (4.0, 0.0), (8.0, 0.0), (1.0, 0.01), (1.0, 0.1), (1.0, 1.0))
"""Length and damping, the latter of the Hessian's diagonal, of the steps that are tried."""
_HARDER = 100.0  # times the damping where no step was an improvement
_CLOSE_NATS = 1e-7  # a step that promises less is not asked for
_CHUNK_NUMBERS = 2**19  # numbers of scores handled at once


class SecondOrderFit(SummedFit[OptionsT]):
    """Fits numbers theta (P,) that scores are differentiable in; never worse than where it starts.

    Sums are of the probability mixture's loss, its gradient and Hessian along the directions that
    change gates. Where the fused model mixes logits, the last round compares what was found with
    the fallback under that mixture, as the pooled fit does.
    """

    rounds: ClassVar[int] = 5
    gradient_bound: ClassVar[float]
    """Of a token's gradient along any of the directions."""
    hessian_bound: ClassVar[float]

    @abc.abstractmethod
    def begin(self) -> Tensor:
        """Where it starts, (P,) float64."""

    def fall_back(self) -> Tensor:
        """What is kept if it is better than anything found, (P,) float64; where it starts."""
        return self.begin()

    @abc.abstractmethod
    def directions(self) -> Tensor:
        """Orthonormal directions along which gates change, (P, p) float64."""

    @abc.abstractmethod
    def features(self, bank: "CalibrationBank") -> Tensor:
        """What scores are computed from, (N, T, ...)."""

    @abc.abstractmethod
    def score(self, features: Tensor, theta: Tensor) -> Tensor:
        """Scores (B, T, E) of features of B blocks in float64, twice differentiable in theta."""

    @abc.abstractmethod
    def tensors(self, theta: Tensor) -> dict[str, Tensor]:
        """What the router keeps of theta."""

    @override
    def start(self) -> SummedState | Finished:
        if self.setting.num_experts == 1:  # no number changes its gates
            return Finished(self.tensors(self.begin()))
        points = torch.stack([self.begin(), self.fall_back()])
        return {"points": points[:1] if torch.equal(points[0], points[1]) else points}

    @override
    def send(self, state: SummedState) -> SummedState:
        return {name: state[name] for name in ("points", "compare") if name in state}

    @override
    def entries(self, state: SummedState) -> dict[str, SumEntry]:
        count, width = len(state["points"]), self.directions().shape[1]
        loss = SumEntry((count,), -LEAST_LOGPROB)
        if _compares(state):
            return {"own_loss": loss}
        half = width * (width + 1) // 2
        return {
            "loss": loss,
            "gradient": SumEntry((count, width), self.gradient_bound),
            "hessian": SumEntry((count, half), self.hessian_bound),
        }

    @override
    def measure(
        self, bank: "CalibrationBank", state: SummedState, weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        domains, features = self.setting.domains, self.features(bank)
        by_block = torch.tensor([weights.get(d, 0.0) for d in domains], dtype=torch.float64)
        by_block = by_block[locate_domains(bank, domains)].to(bank.device)
        per_block = bank.block_size * bank.num_experts
        chunk = max(1, _CHUNK_NUMBERS // per_block)
        totals: dict[str, Tensor] = {}
        with limit_threads(1):  # the same sums whatever the machine has
            for start in range(0, bank.num_blocks, chunk):
                rows = slice(start, min(start + chunk, bank.num_blocks))
                part = features[rows].to(bank.device).double()
                for index, theta in enumerate(state["points"].to(bank.device)):
                    found = (
                        self._compute_own_loss(bank, rows, part, theta, by_block[rows])
                        if _compares(state)
                        else self._differentiate(bank, rows, part, theta, by_block[rows])
                    )
                    for name, value in found.items():
                        shape = (len(state["points"]), *value.shape)
                        total = totals.setdefault(name, torch.zeros(shape, dtype=torch.float64))
                        total[index] += value.cpu()
        entries = self.entries(state)
        return {n: t.clamp(-entries[n].bound, entries[n].bound) for n, t in totals.items()}

    def _compute_own_loss(
        self, bank: "CalibrationBank", rows: slice, part: Tensor, theta: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """The loss under the bank's own mixture, ()."""
        with torch.no_grad():
            losses = bank.score_nll(self.score(part, theta).float(), rows).double()
        return {"own_loss": losses.clamp(0.0, -LEAST_LOGPROB).sum(dim=1) @ weights}

    def _differentiate(
        self, bank: "CalibrationBank", rows: slice, part: Tensor, theta: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """Loss (), gradient (p,) and the upper half of the Hessian, all of weighted sums."""
        basis = self.directions().to(theta.device)
        logprob = bank.logprob[rows].to(theta.device).double().clamp_min(LEAST_LOGPROB)
        along = torch.zeros(
            basis.shape[1], dtype=torch.float64, device=theta.device, requires_grad=True
        )
        scores = self.score(part, theta + basis @ along)
        losses = compute_probability_nll(torch.log_softmax(scores, dim=-1), logprob)
        loss = losses.sum(dim=1) @ weights
        (gradient,) = torch.autograd.grad(loss, along, create_graph=True)
        hessian = torch.stack(
            [torch.autograd.grad(g, along, retain_graph=True)[0] for g in gradient.unbind()]
        )
        row, column = torch.triu_indices(len(along), len(along))
        return {
            "loss": loss.detach(),
            "gradient": gradient.detach(),
            "hessian": hessian.detach()[row, column],
        }

    @override
    def advance(self, state: SummedState, totals: Mapping[str, Tensor]) -> SummedState | Finished:
        if _compares(state):
            better = int(totals["own_loss"].argmin())  # the fallback is the first of two
            return Finished(self.tensors(state["points"][better]))
        best = self._choose(state, totals)
        width = len(best["gradient"])
        hessian = torch.zeros(width, width, dtype=torch.float64)
        row, column = torch.triu_indices(width, width)
        hessian[row, column] = hessian[column, row] = best["hessian"]
        steps, promised = _propose(best["gradient"], hessian, float(best["harder"]))
        last = self.rounds - (1 if self.setting.mixture != "probability" else 0)
        if int(best["round"]) >= last or promised < _CLOSE_NATS:
            return self._end(best)
        return {**best, "points": best["theta"] + steps @ self.directions().T}

    def _choose(self, state: SummedState, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The best point so far with what is known there."""
        losses = totals["loss"]
        is_first = "round" not in state
        index = 0 if is_first else int(losses.argmin())
        found = {
            "theta": state["points"][index],
            "loss": losses[index],
            "gradient": totals["gradient"][index],
            "hessian": totals["hessian"][index],
            "harder": torch.ones((), dtype=torch.float64),
        }
        if is_first:
            return {**found, "fallback_loss": losses[-1], "round": torch.ones(())}
        if float(losses[index]) >= float(state["loss"]):
            found = {name: state[name] for name in found}
            found["harder"] = state["harder"] * _HARDER
        after = {"fallback_loss": state["fallback_loss"], "round": state["round"] + 1}
        return {**found, **after}

    def _end(self, best: Mapping[str, Tensor]) -> SummedState | Finished:
        fallback = self.fall_back()
        if self.setting.mixture != "probability":
            return {"points": torch.stack([fallback, best["theta"]]), "compare": torch.ones(())}
        is_better = float(best["loss"]) < float(best["fallback_loss"])
        return Finished(self.tensors(best["theta"] if is_better else fallback))


def spread_evenly(count: int) -> Tensor:
    """Orthonormal directions that leave the sum of `count` numbers as it is, (count, count - 1).

    Gates do not change where all experts' priors grow by the same: along that direction the loss is
    flat, and without it nothing is.
    """
    centred = torch.eye(count, dtype=torch.float64) - 1 / count
    return torch.linalg.eigh(centred)[1][:, 1:]


def _compares(state: SummedState) -> bool:
    return "compare" in state


def _propose(gradient: Tensor, hessian: Tensor, harder: float) -> tuple[Tensor, float]:
    """Steps (M, p), one a damping, and by how much the model says the first lowers the loss, nats.

    Curvature counts by its size: along directions where the loss curves down a step still lowers
    it. Every axis is in units of its own curvature, so that dampings mean the same for all.
    """
    scale = hessian.diagonal().abs().clamp_min(1e-12).sqrt()
    values, vectors = torch.linalg.eigh(hessian / torch.outer(scale, scale))
    along = vectors.T @ (gradient / scale)
    curvature = values.abs().clamp_min(1e-8)
    steps = [
        -length * (vectors @ (along / (curvature + damping * harder))) / scale
        for length, damping in _TRIED
    ]
    return torch.stack(steps), float((along**2 / curvature).sum()) / 2
