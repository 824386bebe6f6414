"""Few numbers fitted by sums: second-order steps over members' losses, gradients and curvatures.

The coordinator proposes points, members answer with loss, gradient and curvature at each, and the
next points are steps of several kinds from the best one seen; see docs/routers.md.
"""

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from molora_fed.bank.mixture import compute_probability_nll
from molora_fed.models.runtime import limit_threads
from molora_fed.routing.contract import OptionsT
from molora_fed.routing.summed import (
    Finished,
    SumEntry,
    SummedFit,
    SummedState,
    locate_domains,
)

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = ["LEAST_LOGPROB", "SecondOrderFit", "compute_token_losses", "spread_evenly"]

LEAST_LOGPROB = -100.0
"""Nats; what an expert gives a token less than counts as this much, so that sums are bounded."""

_TRIED = (
    (0.0, 2.0),
    (0.5, 2.0),
    (0.8, 2.0),
    (0.9, 2.0),
    (0.9, 1.0),
    (0.95, 1.0),
    (1.0, 1.0),
    (1.0, 2.0),
    (1.0, 4.0),
    (1.0, 8.0),
)
"""Of the steps that are tried: the share of R in C - share * R, and their length.

Share 0 is a step of EM, whose curvature is never negative, share 1 one of Newton's.
"""
_SHORTER = 0.2  # all lengths are times this where no step was an improvement
_CLOSE_NATS = 1e-7  # a step that promises less is not asked for
_CHUNK_NUMBERS = 2**19  # numbers of scores handled at once


class SecondOrderFit(SummedFit[OptionsT]):
    """Fits numbers theta (P,) that scores are differentiable in; never worse than the fallback.

    With g the gates, r the experts' responsibilities for the next token and J the derivatives of
    scores, members send sums over tokens of the probability mixture's loss, of its gradient
    J^T (g - r), and of the covariances of J under g and under r, C and R; the Hessian is C - R,
    exactly where scores are linear. Where the fused model mixes logits, the last round compares
    what was found with the fallback under that mixture, as the pooled fit does.
    """

    rounds = 5
    slope_bound: ClassVar[float]
    """Of the differences of two experts' derivatives, along any of the directions."""

    @abc.abstractmethod
    def begin(self) -> Tensor:
        """Points of the first round, (M, P) float64; the first is the fallback."""

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
            return Finished(self.tensors(self.begin()[0]))
        return {"points": self.begin()}

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
            "gradient": SumEntry((count, width), self.slope_bound),
            "gates_curvature": SumEntry((count, half), self.slope_bound**2),
            "text_curvature": SumEntry((count, half), self.slope_bound**2),
        }

    @override
    def limit_numbers(self) -> tuple[int, ...]:
        if self.setting.num_experts == 1:
            return ()
        first = self.begin()
        later = first.new_zeros(len(_TRIED), first.shape[1])
        numbers = [
            sum(entry.size for entry in self.entries({"points": points}).values())
            for points in (first, later)
        ]
        return (numbers[0], *[numbers[1]] * (self.rounds - 1))

    @override
    def measure(
        self, bank: "CalibrationBank", state: SummedState, weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        domains, features = self.setting.domains, self.features(bank)
        by_block = torch.tensor([weights.get(d, 0.0) for d in domains], dtype=torch.float64)
        by_block = by_block[locate_domains(bank, domains)].to(bank.device)
        per_block = bank.block_size * bank.num_experts * self.directions().shape[1]
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
            losses = compute_token_losses(bank, self.score(part, theta), rows)
        return {"own_loss": losses.sum(dim=1) @ weights}

    @torch.no_grad()
    def _differentiate(
        self, bank: "CalibrationBank", rows: slice, part: Tensor, theta: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """Weighted sums over some blocks: loss (), gradient (p,), upper halves of C and R."""
        basis = self.directions().to(theta.device)
        origin = torch.zeros(basis.shape[1], dtype=torch.float64, device=theta.device)

        def score(along: Tensor) -> tuple[Tensor, Tensor]:
            found = self.score(part, theta + basis @ along)[:, :-1]
            return found, found

        slopes, scores = torch.func.jacfwd(score, has_aux=True)(origin)  # (B, T-1, E, p)
        log_gates = torch.log_softmax(scores, dim=-1)
        logprob = bank.logprob[rows, 1:].to(theta.device).double().clamp_min(LEAST_LOGPROB)
        joint = log_gates + logprob
        weight = weights.view(-1, 1, 1)
        found = {"loss": -(torch.logsumexp(joint, dim=-1).sum(dim=1) @ weights)}
        gates, text = log_gates.exp(), torch.softmax(joint, dim=-1)
        row, column = torch.triu_indices(len(origin), len(origin))
        for name, share in (("gates_curvature", gates), ("text_curvature", text)):
            mean = torch.einsum("bte,btep->btp", share, slopes)
            around = (slopes - mean.unsqueeze(2)) * (share * weight).sqrt().unsqueeze(-1)
            flat = around.flatten(0, 2)
            found[name] = (flat.T @ flat)[row, column]
        found["gradient"] = torch.einsum("bte,btep->p", (gates - text) * weight, slopes)
        return found

    @override
    def advance(self, state: SummedState, totals: Mapping[str, Tensor]) -> SummedState | Finished:
        if _compares(state):
            better = int(totals["own_loss"].argmin())  # the fallback is the first of two
            return Finished(self.tensors(state["points"][better]))
        best = self._choose(state, totals)
        steps, promised = _propose(
            best["gradient"], best["gates_curvature"], best["text_curvature"], float(best["reach"])
        )
        last = self.rounds - (1 if self.setting.mixture != "probability" else 0)
        if int(best["round"]) < last and promised > _CLOSE_NATS:
            return {**best, "points": best["theta"] + steps @ self.directions().T}
        points = torch.stack([self.begin()[0], best["theta"]])
        if self.setting.mixture != "probability":
            return {"points": points, "compare": torch.ones(())}
        return Finished(self.tensors(best["theta"]))

    @staticmethod
    def _choose(state: SummedState, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The best point so far, what is known there, and how many rounds were answered."""
        index = int(totals["loss"].argmin())
        known = {"theta": state["points"], **totals}
        found = {name: values[index] for name, values in known.items()}
        reach = torch.ones((), dtype=torch.float64)
        if "loss" in state and float(found["loss"]) >= float(state["loss"]):
            found, reach = {name: state[name] for name in found}, state["reach"] * _SHORTER
        return {**found, "reach": reach, "round": state.get("round", torch.zeros(())) + 1}


def compute_token_losses(bank: "CalibrationBank", scores: Tensor, rows: slice) -> Tensor:
    """Losses of the gates softmax(scores) under the bank's mixture, bounded by -LEAST_LOGPROB.

    Args:
        bank: Its `score_nll` mixes logits; distributions are mixed in float64 here.
        scores: Of some blocks, (B, T, E) float64.
        rows: The blocks.

    Returns:
        Loss of x_1 .. x_{T-1} in nats, (B, T-1) float64; differentiable in `scores`.
    """
    if bank.readout is not None:
        return bank.score_nll(scores.float(), rows).double().clamp(0.0, -LEAST_LOGPROB)
    logprob = bank.logprob[rows].to(scores.device).double().clamp_min(LEAST_LOGPROB)
    return compute_probability_nll(torch.log_softmax(scores, dim=-1), logprob)


def spread_evenly(count: int) -> Tensor:
    """Orthonormal directions that leave the sum of `count` numbers as it is, (count, count - 1).

    Gates do not change where all experts' priors grow by the same: along that direction the loss is
    flat, and without it nothing is.
    """
    centred = torch.eye(count, dtype=torch.float64) - 1 / count
    return torch.linalg.eigh(centred)[1][:, 1:]


def _compares(state: SummedState) -> bool:
    return "compare" in state


def _propose(
    gradient: Tensor, gates_curvature: Tensor, text_curvature: Tensor, reach: float
) -> tuple[Tensor, float]:
    """Steps (M, p), and by how much the model says that Newton's lowers the loss, nats.

    Curvature counts by its size: along directions where the loss curves down a step still lowers
    it. Every axis is in units of the gates' curvature along it.
    """
    width = len(gradient)
    row, column = torch.triu_indices(width, width)

    def unfold(half: Tensor) -> Tensor:
        whole = torch.zeros(width, width, dtype=torch.float64)
        whole[row, column] = whole[column, row] = half
        return whole

    gates, text = unfold(gates_curvature), unfold(text_curvature)
    scale = gates.diagonal().clamp_min(1e-12).sqrt()
    units = torch.outer(scale, scale)
    steps, promised = [], 0.0
    for share, length in _TRIED:
        values, vectors = torch.linalg.eigh((gates - share * text) / units)
        along = vectors.T @ (gradient / scale)
        curvature = values.abs().clamp_min(1e-6)
        steps.append(-length * reach * (vectors @ (along / curvature)) / scale)
        promised = float((along**2 / curvature).sum()) / 2
    return torch.stack(steps), promised
