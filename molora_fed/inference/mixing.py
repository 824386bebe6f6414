"""From a pass's rows to one distribution: experts' outputs mixed, or a population's updates."""

from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from molora_fed.bank.views import GateView, RouterView
from molora_fed.errors import ShapeError
from molora_fed.guard import guarded
from molora_fed.inference.expert_pass import ExpertPass, Piece
from molora_fed.inference.fused_cache import FusedCache
from molora_fed.inference.fused_config import FusedConfig
from molora_fed.inference.shared_inputs import Rows
from molora_fed.plugins import Entry
from molora_fed.population.contract import AdapterRouter
from molora_fed.routing.contract import OutputRouter
from molora_fed.types import Mixture

__all__ = ["Mixer", "OutputMixer", "UpdateMixer", "mix_distributions"]

_LEAST = 1e-30  # a probability that float32 still resolves
_LOGITS_AT_ONCE = 2**22  # numbers; bounds the memory of a prompt's evidence


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
    if experts == 1:
        return expert_logprob[0]
    if mixture == "logit":
        weighted = expert_logprob * gates.movedim(-1, 0).unsqueeze(-1)
        return torch.log_softmax(weighted.sum(0), dim=-1)
    # Nothing overflows, as neither factor is above 1; what underflows is done the careful way.
    mixed = torch.einsum("bte,ebtv->btv", gates, expert_logprob.exp())
    if bool(mixed.amin() >= _LEAST):
        return mixed.log()
    return torch.logsumexp(expert_logprob + gates.log().movedim(-1, 0).unsqueeze(-1), dim=0)


class Mixer(Protocol):
    """What makes one distribution of a pass."""

    def mix(self, piece: Piece, fixed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Read a piece of texts.

        Args:
            piece: The piece.
            fixed: Gates in place of the router's, (B, E), NaN where the router decides.

        Returns:
            Log-probabilities at the kept positions, (B, kept, V) nats, and the gates of all,
            (B, t, E).
        """


class OutputMixer:
    """Mixes the experts' distributions by a router's gates."""

    def __init__(
        self,
        expert_pass: ExpertPass,
        config: FusedConfig,
        names: tuple[str, ...],
        router: OutputRouter | None,
        entry: Entry | None,
    ) -> None:
        """Take the parts of a model.

        Args:
            expert_pass: What runs the experts.
            config: The model's.
            names: Of the experts.
            router: What weighs them; None of one expert.
            entry: Who registered the router.
        """
        self._pass = expert_pass
        self._config = config
        self._names = names
        self._router = router
        self._entry = entry
        self._reads = frozenset() if router is None else router.reads(router.options)

    def mix(self, piece: Piece, fixed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-probabilities at the kept positions, and the gates of all, (B, t, E)."""
        cache, experts = piece.cache, len(self._names)
        if cache is not None and cache.merged is not None:
            states = self._pass.run_merged(piece, cache.merged)
            held_gates = cache.merged[:, None].expand(-1, piece.tokens.shape[1], -1)
            return self._pass.compute_logprob(states[:, piece.keep]), held_gates
        chosen = self._choose_experts(fixed, cache)
        hidden = self._pass.run_experts(piece, chosen)  # (k, B, t, D)
        held = None if cache is None else cache.held
        reads_evidence = "evidence" in self._reads and held is None and chosen is None
        wanted = hidden[:experts, :, piece.keep]
        logprob = self._pass.compute_logprob(wanted)
        evidence = None
        if reads_evidence:
            is_whole = wanted.shape[2] == hidden.shape[2]
            known = logprob if is_whole else None
            evidence = self._compute_evidence(piece, hidden[:experts], known)
            if cache is not None:
                cache.last = logprob[:, :, -1]
                cache.weigh(evidence, piece.starts)
        gates = self._compute_gates(piece, hidden, evidence, fixed, chosen)
        used = gates[:, piece.keep]
        if chosen is not None:
            index = chosen[:, None].expand(-1, used.shape[1], -1)
            used = used.gather(-1, index)
        return mix_distributions(logprob, used, self._config.mixture), gates

    @property
    def reads_base_alone(self) -> bool:
        """Whether gates need no expert to run: they rest on the base's states."""
        states = {"base_hidden", "prefix_hidden"}
        return bool(self._reads) and self._reads <= states and len(self._names) > 1

    def compute_base_gates(self, piece: Piece) -> Tensor:
        """Gates after whole texts, (B, E), of one pass of the base."""
        batch = len(piece.tokens)
        rows = Rows(expert=torch.zeros(batch, dtype=torch.long, device=piece.tokens.device))
        hidden = self._pass.run(rows, piece, 1, None)
        columns: dict[str, Tensor] = {}
        if "base_hidden" in self._reads:
            columns["base_hidden"] = hidden
        if "prefix_hidden" in self._reads:
            assert self._pass.prefix is not None
            columns["prefix_hidden"] = self._pass.prefix[:batch]
        assert self._router is not None
        with nullcontext() if self._entry is None else guarded(self._entry, "gates"):
            gates = self._router.gates(RouterView(piece.starts, **columns))
        return gates[:, -1]

    def _choose_experts(self, fixed: Tensor | None, cache: FusedCache | None) -> Tensor | None:
        """Experts to run for each text, (B, k); None for all."""
        if cache is not None and (cache.tokens is not None or cache.kept is not None):
            return cache.kept
        if fixed is None or bool(fixed.isnan().any()) or len(self._names) == 1:
            return None
        count = int((fixed > 0).sum(-1).max())
        if count >= len(self._names):
            return None
        kept = fixed.argsort(dim=-1, descending=True, stable=True)[:, :count]
        if cache is not None:
            cache.kept = kept
        return kept

    def _compute_evidence(self, piece: Piece, hidden: Tensor, known: Tensor | None) -> Tensor:
        """`log p_e(x_t | x_<t)` of the piece's tokens, (B, t, E); 0 at a document's first."""
        tokens = piece.tokens
        last = None if piece.cache is None else piece.cache.last
        if last is None:
            parts = [hidden.new_zeros((*hidden.shape[:2], 1), dtype=torch.float32)]
        else:
            parts = [_look_up(last.unsqueeze(2), tokens[:, :1])]
        end = tokens.shape[1] - 1
        if known is not None and end:
            parts.append(_look_up(known[:, :, :-1], tokens[:, 1:]))
        elif end:
            width = self._config.vocab_size * hidden.shape[0] * hidden.shape[1]
            step = max(1, _LOGITS_AT_ONCE // width)
            for at in range(0, end, step):
                stop = min(at + step, end)
                found = self._pass.compute_logprob(hidden[:, :, at:stop])
                parts.append(_look_up(found, tokens[:, at + 1 : stop + 1]))
        evidence = torch.cat(parts, dim=2).movedim(0, -1)
        return evidence.masked_fill(piece.starts.unsqueeze(-1), 0.0)

    def _compute_gates(
        self,
        piece: Piece,
        hidden: Tensor,
        evidence: Tensor | None,
        fixed: Tensor | None,
        chosen: Tensor | None,
    ) -> Tensor:
        """Gates of the piece's positions, (B, t, E)."""
        batch, count = piece.tokens.shape
        experts, cache = len(self._names), piece.cache
        if cache is not None and cache.held is not None:
            return cache.held[:, None].expand(-1, count, -1)
        if experts == 1:
            return hidden.new_ones(batch, count, 1, dtype=torch.float32)
        if chosen is not None and fixed is not None:
            return fixed[:, None].expand(-1, count, -1)
        router = self._router
        assert router is not None
        view = RouterView(piece.starts, evidence=evidence, **self._read_hidden(hidden))
        with nullcontext() if self._entry is None else guarded(self._entry, "gates"):
            if cache is None:
                gates = router.gates(view)
            else:
                state = cache.state if cache.state is not None else router.init_state(batch)
                gates, cache.state = router.step(view, state)
        if fixed is not None:
            given = fixed[:, None].to(gates)
            gates = torch.where(given.isnan(), gates, given)
        return gates

    def _read_hidden(self, hidden: Tensor) -> dict[str, Tensor]:
        """The hidden states the router reads."""
        experts = hidden[: len(self._names)]
        columns: dict[str, Tensor] = {}
        if "prefix_hidden" in self._reads:
            assert self._pass.prefix is not None
            columns["prefix_hidden"] = self._pass.prefix[: hidden.shape[1]]
        if "base_hidden" in self._reads:
            columns["base_hidden"] = hidden[self._pass.base_row]
        if "mean_hidden" in self._reads:
            columns["mean_hidden"] = experts.float().mean(0)
        if "experts_hidden" in self._reads:
            columns["experts_hidden"] = experts.movedim(0, 2)
        return columns


class UpdateMixer:
    """Mixes a population's updates inside the layers by an adapter router's gates."""

    def __init__(
        self, expert_pass: ExpertPass, router: AdapterRouter, embeddings: nn.Module
    ) -> None:
        """Take the parts of a model.

        Args:
            expert_pass: What runs the base and the mixture.
            router: What gives gates.
            embeddings: The base's token embeddings.
        """
        self._pass = expert_pass
        self._router = router
        self._embeddings = embeddings
        self._reads = router.reads(router.options)

    def mix(self, piece: Piece, fixed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-probabilities at the kept positions, and the gates of all, (B, t, P)."""
        if fixed is not None and not bool(fixed.isnan().any()):
            # The router has nothing to decide, so that the base need not run for it.
            gates = fixed[:, None].float().expand(-1, piece.tokens.shape[1], -1)
            rows = Rows(gates=gates, num_experts=gates.shape[-1])
            hidden = self._pass.run(rows, piece, 1, piece.cache)
        else:
            gates = self._compute_gates(piece)
            if fixed is not None:
                given = fixed[:, None].to(gates)
                gates = torch.where(given.isnan(), gates, given)
            hidden = self._pass.run_on(Rows(gates=gates, num_experts=gates.shape[-1]), piece)
        return self._pass.compute_logprob(hidden[:, piece.keep]), gates

    def _compute_gates(self, piece: Piece) -> Tensor:
        """The router's gates of the piece's positions, (B, t, P)."""
        cache = piece.cache
        columns = {"document_starts": piece.starts}
        if "base_hidden" in self._reads:
            nobody = Rows(expert=torch.full((len(piece.tokens),), -1), num_experts=0)
            base = None if cache is None else cache.make_base()
            columns["base_hidden"] = self._pass.run(nobody, piece, 1, base)
        if "embeddings" in self._reads:
            columns["embeddings"] = self._embeddings(piece.tokens)
        if cache is not None:
            # Gates may rest on all of the past, a running mean of it, say.
            for name, column in columns.items():
                before = cache.columns.get(name)
                whole = column if before is None else torch.cat([before, column], dim=1)
                cache.columns[name] = columns[name] = whole
        gates = self._router.compute_gates(GateView(**columns))
        return gates[:, -piece.tokens.shape[1] :]


def _look_up(logprob: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities (E, B, t) of tokens (B, t) among those of all, (E, B, t, V)."""
    index = tokens.unsqueeze(-1).expand(len(logprob), -1, -1, 1)
    return logprob.gather(-1, index).squeeze(-1)
