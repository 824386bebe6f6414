"""The statistics router fitted by sums: constant gates, moments, then constants, in four rounds."""

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from molora_fed.models.runtime import limit_threads
from molora_fed.routing.contract import RouterOptions
from molora_fed.routing.summed import (
    Finished,
    FitSetting,
    SumEntry,
    SummedFit,
    SummedState,
    locate_domains,
)
from molora_fed.types import Reading
from molora_kalavai.discriminant import (
    CONSTANTS,
    SAMPLED_TOKENS,
    Discriminant,
    Sample,
    diagonalise,
    try_constants,
)
from molora_kalavai.mixtures import MIXTURES_TRIED, measure_mixtures, propose_mixtures
from molora_kalavai.moments import ClassMoments, add_up_moments

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = ["StatisticsSums"]

_LARGEST_STATE = 1e4  # a hidden state's coordinate beyond counts as this much
_LARGEST_LOSS = 100.0  # nats; so does a token's loss
_LARGEST_BLOCK = 1e6  # tokens
_PER_POSITION = 2.0  # tokens to a predicted one at most: a block has two at least
_MOMENTS = ("tokens", "squares", "segments", "sums", "total", "grouped")
_SYMMETRIC = ("total", "grouped")
_SENT = ("mixtures", "collect", "weights", "folds.")


class StatisticsSums(SummedFit[RouterOptions]):
    """Rounds: constant gates of each domain, again, again with the moments, and the constants.

    The first three rounds are second-order steps for the constant gates. The third asks for the
    moments of every fold, too; the fourth for the losses of all constants on a sample of positions,
    out of fold, and for the last constant gates.
    """

    rounds = 4

    def __init__(
        self, setting: FitSetting, options: RouterOptions, name: Reading, folds: int, label: str
    ) -> None:
        super().__init__(setting, options)
        self._name = name
        self._folds = folds
        self._label = label

    @override
    def start(self) -> SummedState:
        shape = (1, len(self.setting.domains), self.setting.num_experts)
        return {"mixtures": torch.full(shape, 1 / shape[2], dtype=torch.float64)}

    @override
    def send(self, state: SummedState) -> SummedState:
        return {name: tensor for name, tensor in state.items() if name.startswith(_SENT)}

    @override
    def entries(self, state: SummedState) -> dict[str, SumEntry]:
        tried, domains, size = state["mixtures"].shape
        found = {
            "loss": SumEntry((domains, tried), _LARGEST_LOSS),
            "shares": SumEntry((domains, tried, size), 1.0),
            "products": SumEntry((domains, tried, size * (size + 1) // 2), 1.0),
        }
        if "collect" in state:
            found |= self._moment_entries()
        if "weights" in state:
            found["constants"] = SumEntry((domains, len(CONSTANTS)), _LARGEST_LOSS)
            found["sampled"] = SumEntry((domains,), 1.0)
        return found

    def _moment_entries(self) -> dict[str, SumEntry]:
        """Of sums over all tokens, by the number of all members' predicted tokens."""
        domains, width = len(self.setting.domains), self.setting.hidden_size
        half = width * (width + 1) // 2
        square = _PER_POSITION * _LARGEST_STATE**2
        by_name = {
            "tokens": SumEntry((self._folds, domains), _PER_POSITION),
            "squares": SumEntry((self._folds, domains), _PER_POSITION * _LARGEST_BLOCK),
            "segments": SumEntry((self._folds, domains), _PER_POSITION),
            "sums": SumEntry((self._folds, domains, width), _PER_POSITION * _LARGEST_STATE),
            "total": SumEntry((self._folds, half), square),
            "grouped": SumEntry((self._folds, half), square),
        }
        return {f"moments.{name}": entry for name, entry in by_name.items()}

    @override
    def limit_numbers(self) -> tuple[int, ...]:
        first = self.start()["mixtures"]
        later = {"mixtures": first.expand(MIXTURES_TRIED + 1, -1, -1)}
        collected, weighed = {**later, "collect": first}, {**later, "weights": first}
        asked = ({"mixtures": first}, later, collected, weighed)
        return tuple(sum(e.size for e in self.entries(state).values()) for state in asked)

    @override
    def measure(
        self, bank: "CalibrationBank", state: SummedState, weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        domain_of = locate_domains(bank, self.setting.domains)
        with limit_threads(1), torch.no_grad():
            found = self._measure_mixtures(bank, domain_of, state["mixtures"], weights)
            if "collect" in state:
                found |= self._measure_moments(bank, domain_of)
            if "weights" in state:
                found |= self._measure_constants(bank, domain_of, state, weights)
        return found

    def _measure_mixtures(
        self,
        bank: "CalibrationBank",
        domain_of: Tensor,
        points: Tensor,
        weights: Mapping[str, float],
    ) -> dict[str, Tensor]:
        entries = self.entries({"mixtures": points})
        found = {n: torch.zeros(e.shape, dtype=torch.float64) for n, e in entries.items()}
        for rows in bank.chunks():
            for domain in domain_of[rows].unique().tolist():
                mine = bank.logprob[rows][domain_of[rows] == domain][:, 1:].flatten(0, 1).cpu()
                share = self._share(domain, weights)
                for name, value in zip(
                    found, measure_mixtures(mine, points[:, domain]), strict=True
                ):
                    found[name][domain] += share * value
        return found

    def _share(self, domain: int, weights: Mapping[str, float]) -> float:
        """One over the domain's predicted tokens."""
        return weights[self.setting.domains[domain]] * len(self.setting.domains)

    def _measure_moments(self, bank: "CalibrationBank", domain_of: Tensor) -> dict[str, Tensor]:
        parts = add_up_moments(
            bank,
            self._name,
            domain_of,
            len(self.setting.domains),
            self._folds,
            largest=_LARGEST_STATE,
            label=self._label,
        )
        found = {}
        row, column = torch.triu_indices(self.setting.hidden_size, self.setting.hidden_size)
        for name in _MOMENTS:
            whole = torch.stack([getattr(part, name) for part in parts]) / self.setting.tokens
            found[f"moments.{name}"] = whole[:, row, column] if name in _SYMMETRIC else whole
        return found

    def _measure_constants(
        self,
        bank: "CalibrationBank",
        domain_of: Tensor,
        state: SummedState,
        weights: Mapping[str, float],
    ) -> dict[str, Tensor]:
        stride = max(1, self.setting.tokens // SAMPLED_TOKENS)
        # A block's text says where its sample begins, wherever the block lies.
        texts = bank.tokens.cpu().numpy().astype("<i4")
        begins = torch.tensor([crc32(text.tobytes()) % stride for text in texts])
        fold_of = np.ascontiguousarray(bank.clusters % self._folds)
        sample = Sample.take(bank, self._name, fold_of, domain_of, stride, begins, self._label)
        share = torch.tensor(
            [
                self._share(d, weights) if name in weights else 0.0
                for d, name in enumerate(self.setting.domains)
            ],
            dtype=torch.float64,
        )
        domains = len(share)
        sampled = torch.bincount(sample.domain, minlength=domains).double() * share
        losses = torch.zeros(domains, len(CONSTANTS), dtype=torch.float64)
        tried = try_constants(sample, _read_folds(state), state["weights"].float())
        for index, (_, likelihood) in enumerate(tried):
            clipped = (-likelihood.double()).clamp(0.0, _LARGEST_LOSS)
            losses[:, index].index_add_(0, sample.domain, clipped)
        return {"constants": losses * share.unsqueeze(1), "sampled": sampled}

    @override
    def advance(self, state: SummedState, totals: Mapping[str, Tensor]) -> SummedState | Finished:
        best = totals["loss"].argmin(dim=1)  # (C,)
        every = torch.arange(len(best))
        gates = state["mixtures"][best, every]  # (C, E)
        if "weights" in state:
            return self._end(state, totals, gates)
        known = (gates, totals["shares"][every, best], totals["products"][every, best])
        proposed = [propose_mixtures(*one) for one in zip(*known, strict=True)]
        # What is best so far is among what is tried: the last round's best is the answer.
        following = torch.cat([torch.stack(proposed, dim=1), gates.unsqueeze(0)])
        after = {"mixtures": following}
        if "collect" in state:
            return {**after, "weights": gates, **self._decompose(totals)}
        if len(state["mixtures"]) > 1:
            after["collect"] = torch.ones(())
        return after

    def _decompose(self, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the discriminants of all text, and of all but each fold."""
        parts = self._read_moments(totals)
        whole = sum(parts[1:], start=parts[0])
        # Without a fold that holds all of a domain there is nothing to compare with.
        others = [
            rest if bool((rest.tokens > 0.5).all()) else whole
            for rest in (whole - part for part in parts)
        ]
        plain = [diagonalise(moments).tensors() for moments in others]
        folds = {f"folds.{name}": torch.stack([one[name] for one in plain]) for name in plain[0]}
        finished = {f"whole.{name}": t for name, t in diagonalise(whole).tensors().items()}
        return {**folds, **finished}

    def _read_moments(self, totals: Mapping[str, Tensor]) -> list[ClassMoments]:
        width = self.setting.hidden_size
        row, column = torch.triu_indices(width, width)
        found: dict[str, Tensor] = {}
        for name in _MOMENTS:
            value = totals[f"moments.{name}"] * self.setting.tokens
            if name in _SYMMETRIC:
                square = torch.zeros(self._folds, width, width, dtype=torch.float64)
                square[:, row, column] = square[:, column, row] = value
                value = square
            found[name] = value
        shift = torch.zeros(width, dtype=torch.float64)
        return [
            ClassMoments(shift, **{name: value[fold] for name, value in found.items()})
            for fold in range(self._folds)
        ]

    def _end(self, state: SummedState, totals: Mapping[str, Tensor], gates: Tensor) -> Finished:
        by_domain = totals["constants"] / totals["sampled"].clamp_min(1e-12).unsqueeze(1)
        chosen = CONSTANTS[int(by_domain.mean(dim=0).argmin())]
        shrinkage, correlation, temperature = chosen
        whole = Discriminant(**{f.name: state[f"whole.{f.name}"] for f in fields(Discriminant)})
        found = whole.shrink(shrinkage).weigh(correlation, temperature)
        return Finished({**found.tensors(), "mixtures": gates.float()})


def _read_folds(state: SummedState) -> list[Discriminant]:
    tensors = {f.name: state[f"folds.{f.name}"] for f in fields(Discriminant)}
    return [
        Discriminant(**{name: stacked[fold] for name, stacked in tensors.items()})
        for fold in range(len(tensors["centre"]))
    ]
