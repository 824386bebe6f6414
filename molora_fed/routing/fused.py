"""The fused model: experts of one base, folded into the batch, mixed by a router's gates.

The base is held once. Every expert is a row of the batch, so one forward pass gives all experts'
distributions; a router turns what is known after each token into gates. The full form
(`FusedModel.forward`) and decoding (molora_fed.inference) read the same `Runner`.
"""

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from molora_fed.adapters.folded import FoldedExperts
from molora_fed.adapters.updates import Adapter
from molora_fed.bank.views import RouterView
from molora_fed.errors import RoutingError, ShapeError
from molora_fed.guard import guarded
from molora_fed.models.states import Capture, capture_states, evaluating
from molora_fed.plugins import Entry
from molora_fed.routing.contract import OutputRouter
from molora_fed.types import Mixture, Reading

if TYPE_CHECKING:
    from molora_fed.models.base import Base

__all__ = ["FusedExpert", "FusedModel", "FusedOutput", "Piece", "Runner", "mix_distributions"]


@dataclass(frozen=True, eq=False)
class FusedExpert:
    """One expert of a fused model.

    Attributes:
        name: The contributor's name; "base" for the base itself.
        adapter: What it adds to the base; None for the base itself.
        domain: Domain it was trained on; None for the base.
        contribution: Contribution id; None for the base.
    """

    name: str
    adapter: Adapter | None
    domain: str | None = None
    contribution: str | None = None


@dataclass(frozen=True)
class FusedOutput:
    """What a fused model says about a text.

    Attributes:
        log_probs: Log-probabilities of the next token, (B, T, V) float32 in nats.
        gates: Gates of the experts, (B, T, E).
    """

    log_probs: Tensor
    gates: Tensor


def mix_distributions(expert_logprob: Tensor, gates: Tensor, mixture: Mixture) -> Tensor:
    """Mix experts' next-token distributions.

    The logit mixture is taken over log-probabilities: each expert's normaliser is a constant over
    the vocabulary, so the softmax of the gate-weighted sum is that of the logits themselves.

    Args:
        expert_logprob: Log-probabilities of every expert, (E, B, T, V) in nats.
        gates: Gates (B, T, E), non-negative, summing to 1 over E.
        mixture: "probability" (sum of distributions) or "logit" (normalised weighted product).

    Returns:
        Log-probabilities of the mixture, (B, T, V) in nats.

    Raises:
        ShapeError: If the shapes do not belong together.

    Source: own derivation, see docs/routers.md; logit mixture: arXiv 2603.22755, section 3.
    """
    experts, *batch_tokens, _ = expert_logprob.shape
    if tuple(gates.shape) != (*batch_tokens, experts):
        raise ShapeError(
            f"Cannot mix experts: expected gates of shape {(*batch_tokens, experts)}, "
            f"got {tuple(gates.shape)}. Use a router fitted on these experts."
        )
    weights = gates.movedim(-1, 0).unsqueeze(-1)  # (E, B, T, 1)
    if mixture == "probability":
        return torch.logsumexp(expert_logprob + weights.log(), dim=0)
    return torch.log_softmax((expert_logprob * weights).sum(0), dim=-1)


@dataclass(frozen=True, eq=False)
class FusedModel:
    """Experts of one base with the router that mixes them.

    Attributes:
        base: The base checkpoint.
        experts: Experts in the order of the router's gates.
        router: The fitted router.
        router_name: Registered name of its class.
        mixture: How distributions are mixed.
        frozen_depth: K; the blocks all experts share with the base.
        entry: Who registered the router; None if it was made by hand.
    """

    base: "Base"
    experts: tuple[FusedExpert, ...]
    router: OutputRouter
    router_name: str
    mixture: Mixture
    frozen_depth: int
    entry: Entry | None = None

    def __post_init__(self) -> None:
        if len(self.experts) != self.router.num_experts:
            raise RoutingError(
                f"Cannot build fused model with router '{self.router_name}': expected "
                f"{self.router.num_experts} experts, got {len(self.experts)}. "
                "Fit the router on a bank of these experts."
            )

    def run_router(self) -> contextlib.AbstractContextManager[None]:
        """The guard that the router's code runs under."""
        return contextlib.nullcontext() if self.entry is None else guarded(self.entry, "gates")

    def find_document_starts(self, tokens: Tensor) -> Tensor:
        """See `molora_fed.models.base.Base.find_document_starts`."""
        return self.base.find_document_starts(tokens)

    def forward(self, tokens: Tensor, document_starts: Tensor | None = None) -> FusedOutput:
        """Run the full form: every position at once, no cache, no gradients.

        Args:
            tokens: Token ids, (B, T), integer.
            document_starts: True at a document's first token, (B, T) bool; found by the
                end-of-text token if None.

        Returns:
            Distributions of the next token, and the gates that mixed them.

        Raises:
            ShapeError: If `tokens` is not (B, T >= 1).
        """
        tokens = tokens.to(device=self.base.model.device, dtype=torch.long)
        _check_ids(tokens)
        starts = self.find_document_starts(tokens) if document_starts is None else document_starts
        with Runner(self, cached=False) as runner:
            piece = runner.step(tokens, starts.to(tokens.device))
            with self.run_router():
                gates = self.router.gates(piece.view)
            return FusedOutput(mix_distributions(piece.expert_logprob, gates, self.mixture), gates)

    def log_probs(self, tokens: Tensor, document_starts: Tensor | None = None) -> Tensor:
        """Log-probabilities of the next token, (B, T, V) in nats; see `forward`."""
        return self.forward(tokens, document_starts).log_probs


@dataclass(frozen=True)
class Piece:
    """What the experts say about a piece of text.

    Attributes:
        expert_logprob: Log-probabilities of the next token, (E, B, t, V) float32 in nats.
        view: What the router reads, of the same positions.
    """

    expert_logprob: Tensor
    view: RouterView


class Runner:
    """Runs all experts over a text, whole or piece by piece; open it with `with`.

    While it is open the base's layers carry the experts' updates; it leaves the base as it was.
    """

    def __init__(self, fused: FusedModel, *, cached: bool) -> None:
        self._fused = fused
        self._model: Any = fused.base.model
        self._cached = cached
        self._cache: Any = None
        self._last: Tensor | None = None  # (E, B, V) log-probabilities after the last token
        self._reads = fused.router.reads(fused.router.options)
        adapters: list[Adapter | None] = [expert.adapter for expert in fused.experts]
        if "base_hidden" in self._reads and None not in adapters:
            adapters.append(None)  # a row that is read and never mixed
        self._base_row = adapters.index(None) if None in adapters else None
        self._num_rows = len(adapters)
        self._folded = FoldedExperts(self._model, adapters)
        self._stack = contextlib.ExitStack()
        self._states: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        depth = self._fused.frozen_depth if "prefix_hidden" in self._reads else None
        hidden: frozenset[Reading] = frozenset({"base_hidden", "mean_hidden", "experts_hidden"})
        capture = Capture(hidden=bool(self._reads & hidden), prefix_depth=depth)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluating(self._model))
            stack.enter_context(self._folded)
            self._states = stack.enter_context(capture_states(self._model, capture))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def step(self, tokens: Tensor, document_starts: Tensor) -> Piece:
        """Read the next piece of text.

        Args:
            tokens: Token ids that follow what was read before, (B, t) int64.
            document_starts: True at a document's first token, (B, t) bool.
        """
        batch = len(tokens)
        output = self._model(
            input_ids=self._folded.expand(tokens),
            past_key_values=self._cache,
            use_cache=self._cached,
        )
        self._cache = output.past_key_values if self._cached else None
        rows = torch.log_softmax(output.logits.float(), dim=-1)
        logprob = rows.unflatten(0, (self._num_rows, batch))[: len(self._fused.experts)]
        columns = self._read_hidden(batch)
        if "evidence" in self._reads:
            evidence = self._compute_evidence(logprob, tokens)
            columns["evidence"] = evidence.masked_fill(document_starts.unsqueeze(-1), 0.0)
        self._last = logprob[:, :, -1]
        return Piece(logprob, RouterView(document_starts=document_starts, **columns))

    def _compute_evidence(self, logprob: Tensor, tokens: Tensor) -> Tensor:
        """`log p_e(x_t | x_<t)` of the piece's tokens, (B, t, E); 0 at the very first."""
        first = torch.zeros_like(logprob[:, :, 0]) if self._last is None else self._last
        before = torch.cat([first.unsqueeze(2), logprob[:, :, :-1]], dim=2)  # (E, B, t, V)
        index = tokens.unsqueeze(-1).expand(len(before), -1, -1, 1)
        return before.gather(-1, index).squeeze(-1).movedim(0, -1)

    def _read_hidden(self, batch: int) -> dict[str, Tensor]:
        """The hidden states the router reads."""
        columns: dict[str, Tensor] = {}
        if "prefix_hidden" in self._reads:
            # The same in every row: the first K blocks are the base's.
            columns["prefix_hidden"] = self._states["prefix"][:batch]
        if "hidden" in self._states:
            rows = self._states["hidden"].unflatten(0, (self._num_rows, batch))
            experts = rows[: len(self._fused.experts)]
            if "base_hidden" in self._reads and self._base_row is not None:
                columns["base_hidden"] = rows[self._base_row]
            if "mean_hidden" in self._reads:
                columns["mean_hidden"] = experts.float().mean(0)
            if "experts_hidden" in self._reads:
                columns["experts_hidden"] = experts.movedim(0, 2)
        return columns


def _check_ids(tokens: Tensor) -> None:
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ShapeError(
            f"Cannot run fused model: expected token ids of shape (B, T) with T >= 1, "
            f"got {tuple(tokens.shape)}. Tokenize a text that is not empty."
        )
