"""What reads tokens and says what comes next: a plain model, a fused one, an evolved one."""

import copy
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.updates import Adapter
from molora_fed.bank.views import GateView
from molora_fed.errors import RoutingError
from molora_fed.inference.flops import TokenCost, count_evolved, count_fused, count_plain
from molora_fed.models.base import Base
from molora_fed.models.states import Capture, capture_states, evaluating
from molora_fed.population.bundle import EvolvedModel
from molora_fed.population.files import fingerprint_population
from molora_fed.population.mixture import Mixture
from molora_fed.population.router_files import pack_router
from molora_fed.routing.fused import FusedModel, Runner, mix_distributions
from molora_fed.routing.top_k import TopKRouter
from molora_fed.storage.files import canonical_json, hash_bytes

__all__ = [
    "Engine",
    "EvolvedEngine",
    "FusedEngine",
    "Model",
    "PlainEngine",
    "PlainModel",
    "Reader",
    "build_engine",
]


@dataclass(frozen=True, eq=False)
class PlainModel:
    """A base checkpoint, or a specialist of it.

    Attributes:
        base: The base, or any checkpoint loaded as one.
        adapter: What the specialist adds to it; None for the base itself.
    """

    base: Base
    adapter: Adapter | None = None


Model = PlainModel | FusedModel | EvolvedModel
"""Everything that writes text."""


class Reader(ABC):
    """Reads texts piece by piece, with a cache; open it with `with`.

    It leaves the model as it was.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @abstractmethod
    def _open(self, stack: ExitStack) -> None:
        """Enter what reading needs."""

    @abstractmethod
    def step(
        self, tokens: Tensor, document_starts: Tensor, *, last: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Read the next piece of the texts.

        Args:
            tokens: Token ids that follow what was read before, (B, t) int64.
            document_starts: True at a document's first token, (B, t) bool.
            last: Only what is said after the last of these tokens is wanted.

        Returns:
            Log-probabilities of the next token, (B, t, V) float32 nats, and the gates behind them,
            (B, t, E); t is 1 with `last`, E is 0 for a model without gates.
        """

    def hold_gates(self) -> None:
        """Keep a text's gates as they are now, if they rest on evidence: it is not collected on."""
        return


class Engine(ABC):
    """A model that can be read with, text after text.

    Attributes:
        base: Its base, whose tokenizer and positions count.
        cost: What a token costs.
        gate_names: Names of its gates, in order.
        max_rows: Texts of one length that may be one batch, where their number is limited.
    """

    base: Base
    cost: TokenCost
    gate_names: tuple[str, ...] = ()
    max_rows: int | None = None

    @abstractmethod
    def read(self, batch: int) -> Reader:
        """A reader of this many texts, from their beginning.

        Raises:
            RoutingError: See `check_causal`.
        """

    def check_causal(self) -> None:
        """Refuse a model that cannot be read from left to right.

        Raises:
            RoutingError: If its router reads the future of a text.
        """
        return

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides its text."""

    def _fingerprint(self, sort: str, *parts: Any) -> str:
        base = self.base
        identity = [sort, base.weights, base.tokenizer_fingerprint, str(base.model.dtype), *parts]
        return hash_bytes(canonical_json(identity))


class _PlainReader(Reader):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model
        self._cache: Any = None

    def _open(self, stack: ExitStack) -> None:
        stack.enter_context(evaluating(self._model))

    def step(
        self, tokens: Tensor, document_starts: Tensor, *, last: bool = False
    ) -> tuple[Tensor, Tensor]:
        output = self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        logits = output.logits[:, -1:] if last else output.logits
        return torch.log_softmax(logits.float(), dim=-1), logits.new_zeros(*logits.shape[:2], 0)


class PlainEngine(Engine):
    """A base or a specialist: a copy of the base with the adapter's updates in its weights."""

    def __init__(self, plain: PlainModel) -> None:
        """Take a base or a specialist.

        Raises:
            IncompatibleAdapterError: If the adapter does not fit.
        """
        self.base = plain.base
        self._adapter = plain.adapter
        self._model = plain.base.model
        if plain.adapter is not None:
            with applied(self._model, plain.adapter):
                self._model = copy.deepcopy(self._model)
        self.cost = count_plain(self._model)

    def read(self, batch: int) -> Reader:
        """See `Engine`."""
        return _PlainReader(self._model)

    def fingerprint(self) -> str:
        """See `Engine`."""
        if self._adapter is None:
            return self._fingerprint("base")
        return self._fingerprint("specialist", self._adapter.hash)


class _FusedReader(Reader):
    def __init__(self, fused: FusedModel, batch: int) -> None:
        super().__init__()
        self._fused = fused
        self._state = fused.router.init_state(batch)
        self._runner = Runner(fused, cached=True)
        self._gates: Tensor | None = None
        self._is_held = False

    def _open(self, stack: ExitStack) -> None:
        stack.enter_context(self._runner)

    def step(
        self, tokens: Tensor, document_starts: Tensor, *, last: bool = False
    ) -> tuple[Tensor, Tensor]:
        fused = self._fused
        piece = self._runner.step(tokens, document_starts)
        gates = self._gates
        if gates is None or not self._is_held:
            gates, self._state = fused.router.step(piece.view, self._state)
            self._gates = gates[:, -1:]
        elif not last:
            gates = gates.expand(-1, tokens.shape[1], -1)
        logprob = piece.expert_logprob
        if last:
            gates, logprob = gates[:, -1:], logprob[:, :, -1:]
        return mix_distributions(logprob, gates, fused.mixture), gates

    def hold_gates(self) -> None:
        router = self._fused.router
        self._is_held = "evidence" in router.reads(router.options)


class FusedEngine(Engine):
    """A fused model; a router that reads evidence goes on learning from what is written."""

    def __init__(self, fused: FusedModel) -> None:
        """Take a fused model."""
        self.base = fused.base
        self._fused = fused
        self.cost = count_fused(fused)
        self.gate_names = tuple(expert.name for expert in fused.experts)

    def read(self, batch: int) -> Reader:
        """See `Engine`."""
        self.check_causal()
        return _FusedReader(self._fused, batch)

    def check_causal(self) -> None:
        """See `Engine`."""
        if not self._fused.router.causal:
            raise RoutingError(
                f"Cannot generate with router '{self._fused.router_name}': expected a causal "
                "router, got one that reads the future of a text. Fuse with another router."
            )

    def fingerprint(self) -> str:
        """See `Engine`."""
        fused = self._fused
        router = {
            key: hash_bytes(tensor.detach().cpu().float().numpy().tobytes())
            for key, tensor in fused.router.state_tensors().items()
        }
        experts = [[e.name, None if e.adapter is None else e.adapter.hash] for e in fused.experts]
        options = fused.router.options.model_dump(mode="json")
        top_k = fused.router.top_k if isinstance(fused.router, TopKRouter) else None
        parts = (experts, fused.router_name, options, router, top_k, fused.mixture)
        return self._fingerprint("fused", *parts)


class _EvolvedReader(Reader):
    """Runs base and mixture side by side, so that gates can read the base's states.

    Gates are causal: those of a text's past never change, and only the new positions run through
    the mixture.
    """

    def __init__(self, evolved: EvolvedModel) -> None:
        """Take an evolved model."""
        super().__init__()
        self._model: Any = evolved.base.model
        self._router = evolved.router
        self._mixture = Mixture(self._model, evolved.population).to(self._model.device)
        self._reads = type(evolved.router).reads(evolved.router.options)
        self._caches: dict[str, Any] = {"base": None, "mixture": None}
        self._columns: dict[str, list[Tensor]] = {}

    def _open(self, stack: ExitStack) -> None:
        stack.enter_context(evaluating(self._model))

    def step(
        self, tokens: Tensor, document_starts: Tensor, *, last: bool = False
    ) -> tuple[Tensor, Tensor]:
        pieces = {"document_starts": document_starts}
        if "base_hidden" in self._reads:
            with capture_states(self._model, Capture(hidden=True)) as states:
                self._run("base", tokens)
                pieces["base_hidden"] = states["hidden"]
        if "embeddings" in self._reads:
            pieces["embeddings"] = self._model.get_input_embeddings().weight[tokens]
        for name, piece in pieces.items():
            self._columns.setdefault(name, []).append(piece)
        # Gates may rest on all of the past, a running mean of it, say.
        view = GateView(**{name: torch.cat(parts, 1) for name, parts in self._columns.items()})
        gates = self._router.compute_gates(view)[:, -tokens.shape[1] :]
        with self._mixture.mixed(gates):
            logits = self._run("mixture", tokens)
        if last:
            logits, gates = logits[:, -1:], gates[:, -1:]
        return torch.log_softmax(logits.float(), dim=-1), gates

    def _run(self, which: str, tokens: Tensor) -> Tensor:
        output = self._model(input_ids=tokens, past_key_values=self._caches[which], use_cache=True)
        self._caches[which] = output.past_key_values
        logits: Tensor = output.logits
        return logits


class EvolvedEngine(Engine):
    """A population inside its base; its texts are read alone, in whatever company they come."""

    max_rows = 1

    def __init__(self, evolved: EvolvedModel) -> None:
        """Take an evolved model."""
        self.base = evolved.base
        self._evolved = evolved
        reads = type(evolved.router).reads(evolved.router.options)
        self.cost = count_evolved(
            evolved.base.model, evolved.population, reads_base="base_hidden" in reads
        )
        self.gate_names = evolved.slot_names

    def read(self, batch: int) -> Reader:
        """See `Engine`."""
        return _EvolvedReader(self._evolved)

    def fingerprint(self) -> str:
        """See `Engine`."""
        evolved = self._evolved
        router = hash_bytes(pack_router(evolved.router, evolved.router_name))
        population = fingerprint_population(evolved.population)
        return self._fingerprint("evolved", population, evolved.router_name, router)


def build_engine(model: Model) -> Engine:
    """What reads and writes with a model.

    Args:
        model: The model.

    Raises:
        IncompatibleAdapterError: If a specialist's adapter does not fit its base.
    """
    match model:
        case PlainModel():
            return PlainEngine(model)
        case FusedModel():
            return FusedEngine(model)
        case EvolvedModel():
            return EvolvedEngine(model)
