"""What reads tokens and says what comes next: a plain model, a fused one, an evolved one."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.updates import Adapter
from molora_fed.errors import RoutingError
from molora_fed.inference.evolved import EvolvedRunner
from molora_fed.inference.flops import TokenCost, count_evolved, count_fused, count_plain
from molora_fed.models.forward import evaluating
from molora_fed.population.bundle import EvolvedModel
from molora_fed.routing.fused import FusedModel, Runner, mix_distributions

__all__ = ["Engine", "EvolvedEngine", "FusedEngine", "PlainEngine", "Step"]

Step = Callable[[Tensor], Tensor]
"""Reads the next tokens (B, t) and gives log-probabilities of the next, (B, t, V) nats."""


class Engine(Protocol):
    """A model that can be read with, text after text.

    Attributes:
        cost: What a token costs.
    """

    cost: TokenCost

    def reading(self, batch: int) -> Any:
        """A context whose value is a `Step` for this many texts, from their beginning."""


class PlainEngine:
    """A causal language model as it is.

    Attributes:
        model: The model.
        cost: What a token costs.
    """

    def __init__(self, model: Any, adapter: Adapter | None = None) -> None:
        """Take a model; with an adapter, a copy of it with the updates added.

        Args:
            model: A causal language model.
            adapter: What to add.

        Raises:
            IncompatibleAdapterError: If the adapter does not fit.
        """
        if adapter is not None:
            with applied(model, adapter):
                model = copy.deepcopy(model)
        self.model = model
        self.cost = count_plain(model)

    @contextmanager
    def reading(self, batch: int) -> Iterator[Step]:
        """See `Engine`."""
        cache: Any = None

        def step(tokens: Tensor) -> Tensor:
            nonlocal cache
            output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            return torch.log_softmax(output.logits.float(), dim=-1)

        with torch.no_grad(), evaluating(self.model):
            yield step


class FusedEngine:
    """A fused model; a router that reads evidence goes on learning from what is written.

    Attributes:
        cost: What a token costs.
    """

    def __init__(self, fused: FusedModel) -> None:
        """Take a fused model.

        Raises:
            RoutingError: If its router is not causal.
        """
        if not fused.router.causal:
            raise RoutingError(
                f"Cannot generate with router '{fused.router_name}': expected a causal router, "
                "got one that reads the future of a text. Fuse with another router."
            )
        self._fused = fused
        self.cost = count_fused(fused)

    @contextmanager
    def reading(self, batch: int) -> Iterator[Step]:
        """See `Engine`."""
        fused = self._fused
        state = fused.router.init_state(batch)
        starts = _Starts()
        with Runner(fused, cached=True) as runner:

            def step(tokens: Tensor) -> Tensor:
                nonlocal state
                piece = runner.step(tokens, starts(tokens))
                gates, state = fused.router.step(piece.view, state)
                return mix_distributions(piece.expert_logprob, gates, fused.mixture)

            yield step


class EvolvedEngine:
    """A population inside its base.

    Attributes:
        cost: What a token costs.
    """

    def __init__(self, evolved: EvolvedModel) -> None:
        """Take an evolved model."""
        self._evolved = evolved
        reads = type(evolved.router).reads(evolved.router.options)
        self.cost = count_evolved(
            evolved.base.model, evolved.population, reads_base="base_hidden" in reads
        )

    @contextmanager
    def reading(self, batch: int) -> Iterator[Step]:
        """See `Engine`."""
        starts = _Starts()
        with EvolvedRunner(self._evolved) as runner:
            yield lambda tokens: runner.step(tokens, starts(tokens))[0]


class _Starts:
    """True at the very first position: a prompt is one document."""

    def __init__(self) -> None:
        self._is_first = True

    def __call__(self, tokens: Tensor) -> Tensor:
        starts = torch.zeros_like(tokens, dtype=torch.bool)
        if self._is_first:
            starts[:, 0] = True
            self._is_first = False
        return starts
