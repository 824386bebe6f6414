"""The paper's two adapter routers; every part of the rewrite can be switched alone.

One formula covers both, for slot i at a position whose pooled input is h:

    s_i = w_i . h + b_i
    c_i = sigmoid(s_i / tau)          competition "sigmoid": gates do not compete
    c_i = softmax_i(s / tau)          competition "softmax": gates sum to 1
    g_i = f_i + (1 - f_i) c_i,        f_i = f_max sigmoid(phi_i), learnable

The rewrite (`parallel-sigmoid`) reads the base's post-stack states, the old router
(`softmax-embedding-mean`) the mean of the document's token embeddings so far. Either is divided by
its root mean square, so that inputs differ in what they say and not in their size.

Source: arXiv 2605.11153, abstract; formulas, start and schedule are our own definition.
"""

import abc
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from molora_fed.bank.views import GateReading, GateView
from molora_fed.errors import PopulationError, ShapeError
from molora_fed.population.contract import AdapterRouter, AdapterRouterOptions
from molora_fed.routing.causal import causal_mean
from molora_fed.storage.seeds import derive_seed

__all__ = [
    "ParallelSigmoidOptions",
    "ParallelSigmoidRouter",
    "SoftmaxEmbeddingMeanOptions",
    "SoftmaxEmbeddingMeanRouter",
]

START_SPREAD = 0.1  # standard deviation of the scores s_i of a fresh slot
SMALLEST_MEAN_SQUARE = 1e-12

Competition = Literal["sigmoid", "softmax"]


@dataclass(frozen=True)
class _Form:
    """One point of the space that both routers lie in.

    Attributes:
        competition: How scores become gates.
        floor: f_max, the largest floor; 0 has none.
        hot: Temperature at the start of adaptation.
        cold: Temperature at its end.
        input: What is read.
    """

    competition: Competition
    floor: float
    hot: float
    cold: float
    input: GateReading


class _LinearGates(AdapterRouter):
    """Gates linear in one pooled state; subclasses say which form their options mean."""

    def __init__(self, num_slots: int, width: int, options: AdapterRouterOptions) -> None:
        super().__init__(num_slots, width, options)
        form = self._form(options)
        self._settings = form
        self.weight = nn.Parameter(torch.zeros(num_slots, width))  # w
        self.bias = nn.Parameter(torch.zeros(num_slots))  # b
        if form.floor > 0:
            self.floor_score = nn.Parameter(torch.zeros(num_slots))  # phi
        self.register_buffer("temperature", torch.tensor(form.hot))

    @classmethod
    @abc.abstractmethod
    def _form(cls, options: Any) -> _Form:
        """The form that these options mean."""

    @classmethod
    def build(cls, num_slots: int, width: int, options: Any, seed: int) -> Self:
        """Weights drawn so that scores start near 0, biases and floor scores 0."""
        router = cls(num_slots, width, options)
        for slot in range(num_slots):
            router.reset_slot(slot, None, seed)
        return router

    @classmethod
    def reads(cls, options: Any) -> frozenset[GateReading]:
        """The one column of its form."""
        return frozenset({cls._form(options).input})

    def forward(self, view: GateView) -> Tensor:
        """Gates, (B, T, P) float32.

        Raises:
            ShapeError: If the view lacks the column, or it has another width.
        """
        form = self._settings
        scores = nn.functional.linear(self._pool(view), self.weight, self.bias)
        scores = scores / self.temperature
        sigmoid = form.competition == "sigmoid"
        shares = torch.sigmoid(scores) if sigmoid else torch.softmax(scores, dim=-1)
        if form.floor == 0:
            return shares
        floor = form.floor * torch.sigmoid(self.floor_score)
        return shares + floor * (1 - shares)  # in this order no rounding exceeds 1

    def _pool(self, view: GateView) -> Tensor:
        """The state that is read, of mean square 1, (B, T, D) float32."""
        form = self._settings
        state = getattr(view, form.input)
        width = self.width
        if state is None or state.shape[-1] != width:
            got = "none" if state is None else f"width {state.shape[-1]}"
            raise ShapeError(
                f"Cannot compute gates: expected '{form.input}' of width {width} in the view, got "
                f"{got}. Pass the states of the base this router was built for."
            )
        state = state.float()
        if form.input == "embeddings":
            state = causal_mean(state, view.document_starts)
        mean_square = state.square().mean(dim=-1, keepdim=True)
        return state * mean_square.clamp_min(SMALLEST_MEAN_SQUARE).rsqrt()

    def set_progress(self, share: float) -> None:
        """Temperature hot^(1 - share) cold^share: bounded by both.

        Raises:
            PopulationError: If the share is not in [0, 1].
        """
        if not 0 <= share <= 1:
            raise PopulationError(
                f"Cannot anneal a router: expected a share of the adaptation from 0 to 1, got "
                f"{share}. Pass steps done by steps in all."
            )
        form = self._settings
        self.temperature.fill_(max(form.cold, form.hot * (form.cold / form.hot) ** share))

    @torch.no_grad()
    def reset_slot(self, slot: int, parent: int | None, seed: int) -> None:
        """The parent's w, b and phi, or a fresh w and zeros; the other slots keep theirs.

        Raises:
            PopulationError: If there is no such slot or parent.
        """
        wanted = [slot] if parent is None else [slot, parent]
        wrong = [index for index in wanted if not 0 <= index < self.num_slots]
        if wrong:
            raise PopulationError(
                f"Cannot reset a router's slot: expected slots from 0 to {self.num_slots - 1}, "
                f"got {', '.join(map(str, wrong))}. Count slots as the population does."
            )
        if parent is not None:
            for values in self.parameters():
                values[slot] = values[parent].clone()
            return
        for values in self.parameters():
            values[slot] = 0.0
        # Slot by slot, so that a slot's start depends on neither the others nor their number.
        state = derive_seed(seed, slot)
        generator = torch.Generator().manual_seed(state)
        drawn = torch.randn(self.width, generator=generator)
        self.weight[slot] = drawn * (START_SPREAD / self.width**0.5)


class ParallelSigmoidOptions(AdapterRouterOptions):
    """Options of the rewrite; each undoes one part of it.

    Attributes:
        competition: "sigmoid" gates each slot by itself, "softmax" makes slots compete.
        floor: Largest floor f_max in [0, 1); 0 has no floor.
        anneal: Whether the temperature falls from `hot` to `cold`; else it is 1.
        hot: Temperature at the start of adaptation.
        cold: Temperature at its end, never below it.
        input: "base_hidden" reads the base's post-stack state, "embeddings" the mean of the
            document's token embeddings so far.
    """

    competition: Competition = "sigmoid"
    floor: float = Field(default=0.1, ge=0, lt=1)
    anneal: bool = True
    hot: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    cold: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    input: GateReading = "base_hidden"

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.cold > self.hot:
            raise ValueError(f"cold {self.cold} must not be above hot {self.hot}")
        return self


class ParallelSigmoidRouter(_LinearGates):
    """The rewrite: a sigmoid gate per slot with a learnable floor and a bounded anneal.

    Source: arXiv 2605.11153, abstract; own definition, see the module's formulas.
    """

    Options: ClassVar[type[AdapterRouterOptions]] = ParallelSigmoidOptions

    @classmethod
    def _form(cls, options: ParallelSigmoidOptions) -> _Form:
        hot, cold = (options.hot, options.cold) if options.anneal else (1.0, 1.0)
        return _Form(options.competition, options.floor, hot, cold, options.input)


class SoftmaxEmbeddingMeanOptions(AdapterRouterOptions):
    """The old router has none."""


class SoftmaxEmbeddingMeanRouter(_LinearGates):
    """The old router: softmax gates on the causal running mean of token embeddings.

    Equals `parallel-sigmoid` with every part of the rewrite undone.

    Source: arXiv 2605.11153, abstract; own definition, made causal.
    """

    Options: ClassVar[type[AdapterRouterOptions]] = SoftmaxEmbeddingMeanOptions

    @classmethod
    def _form(cls, options: SoftmaxEmbeddingMeanOptions) -> _Form:
        return _Form("softmax", 0.0, 1.0, 1.0, "embeddings")
