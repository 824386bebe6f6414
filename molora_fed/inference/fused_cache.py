"""What a fused model remembers of the texts it has read: keys, values, and the router's state."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from molora_fed.errors import RoutingError
from molora_fed.types import ExpertsPerText

__all__ = ["FusedCache", "GrowingLayer", "SkippedLayer", "check_fused_cache"]

_FIRST_ROOM = 64  # positions; doubled whenever they are full


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer in memory that doubles, so that a step copies only its own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._room: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, (N, H, t, D_head), and return all so far, (N, H, T, D_head)."""
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < after or not self._owns_room():
            self._grow(key_states, value_states, before, after)
        assert self._room is not None
        self._room[0][..., before:after, :] = key_states
        self._room[1][..., before:after, :] = value_states
        self.keys, self.values = (room[..., :after, :] for room in self._room)
        self.is_initialized = True
        return self.keys, self.values

    def adopt(self, rooms: tuple[Tensor, Tensor], length: int) -> None:
        """Go on from keys and values that lie in memory with room for more.

        Args:
            rooms: Memory of keys and of values, each (N, H, size, D_head).
            length: Positions of it that are read, at most size.
        """
        self._room = rooms
        self.keys, self.values = (room[..., :length, :] for room in rooms)
        self.dtype, self.device = rooms[0].dtype, rooms[0].device
        self.is_initialized = True

    @staticmethod
    def choose_room(length: int) -> int:
        """Positions of memory for a text of this length that goes on."""
        size = _FIRST_ROOM
        while size <= length:
            size *= 2
        return size

    def _owns_room(self) -> bool:
        """Whether keys are still a view of the memory: reordering and the like replace them."""
        return (
            self._room is not None
            and self.is_initialized
            and self.keys.data_ptr() == self._room[0].data_ptr()
            and self.keys.shape[0] == self._room[0].shape[0]
        )

    def _grow(self, keys: Tensor, values: Tensor, before: int, after: int) -> None:
        size = self.choose_room(after - 1)
        old = (self.keys, self.values) if before else None
        rooms = []
        for index, states in enumerate((keys, values)):
            shape = list(states.shape)
            shape[-2] = size
            room = states.new_empty(shape)
            if old is not None:
                room[..., :before, :] = old[index]
            rooms.append(room)
        self.dtype, self.device = keys.dtype, keys.device
        self._room = (rooms[0], rooms[1])

    def reset(self) -> None:
        """Forget everything."""
        self._room = None
        super().reset()


class SkippedLayer(DynamicLayer):
    """Of a block that does not run: how long its past is, no keys and values.

    Attributes:
        length: Positions so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def get_seq_length(self) -> int:
        """Positions so far."""
        return self.length

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0


class FusedCache(Cache):
    """Everything a fused model needs to read on: made by it, for it, and for the texts it has read.

    Keys and values have a row for every expert and text, row e * B + b; those of blocks that all
    experts share have one for every text. It refuses to go on with another model, other fixed
    gates, or a text that does not begin with what was read.

    Attributes:
        owner: Fingerprint of the model that made it.
        tokens: Token ids read so far, (B, T) int64.
        mask: False where they are padding, (B, T) bool; None where nothing is.
        state: The router's state, tensors with the batch first.
        fixed: Gates given in place of the router's, (B, E), NaN where the router decides; or None.
        kept: Experts that still run for each text, (B, k) int64; None for all of them.
        held: Gates that stay from now on, (B, E); None while the router decides.
        merged: Weights by which the experts' changes are merged into one model for each text,
            (B, E); None while experts run on their own.
        last: Log-probabilities of every expert after the last token, (E, B, V); None if not needed.
        gates: The last position's gates of every step so far, each (B, E).
        evidence: Log-probability that each expert gave to the text's last document so far, (B, E)
            nats; None where no router reads evidence.
        columns: What an adapter router has read so far, (B, T, ...) by name.
        base: Keys and values of the base beside a population.
    """

    def __init__(self, owner: str, config: Any) -> None:
        super().__init__(layers=_make_layers(config))
        self._config = config
        self.owner = owner
        self.tokens: Tensor | None = None
        self.mask: Tensor | None = None
        self.state: Mapping[str, Tensor] | None = None
        self.fixed: Tensor | None = None
        self.kept: Tensor | None = None
        self.held: Tensor | None = None
        self.merged: Tensor | None = None
        self.last: Tensor | None = None
        self.gates: list[Tensor] = []
        self.evidence: Tensor | None = None
        self.columns: dict[str, Tensor] = {}
        self.base: Cache | None = None

    def make_base(self) -> Cache:
        """The base's own keys and values, made at first use."""
        if self.base is None:
            self.base = Cache(layers=_make_layers(self._config))
        return self.base

    def skip(self, depth: int, positions: int) -> bool:
        """Note that the first blocks do not run, as the base's own pass has made their output.

        Args:
            depth: So many blocks.
            positions: How many positions they skip now; 0 before a pass.

        Returns:
            Whether they can be left out: not so where other keys and values depend on theirs, or
            they have run before.
        """
        skipped = self.layers[:depth]
        if self.tokens is None and all(type(layer) is GrowingLayer for layer in skipped):
            self.layers[:depth] = skipped = [SkippedLayer() for _ in skipped]
        if not all(isinstance(layer, SkippedLayer) for layer in skipped):
            return False
        for layer in skipped:
            layer.length += positions
        return True

    def check(self, owner: str, fixed: Tensor | None, rows: int) -> None:
        """Refuse a cache of another model, of other gates, or of another number of texts.

        Args:
            owner: Fingerprint of the model that is about to read on.
            fixed: Gates given for this step.
            rows: Texts of this step.

        Raises:
            RoutingError: If it is another's.
        """
        if owner != self.owner:
            raise RoutingError(
                f"Cannot continue from a cache: expected one of this model, {owner[:12]}, got one "
                f"of {self.owner[:12]}. Read the text again."
            )
        if self.tokens is None:
            return
        if rows != len(self.tokens):
            raise RoutingError(
                f"Cannot continue from a cache: expected {len(self.tokens)} texts, got {rows}. "
                "Read the texts again."
            )
        same = (fixed is None) == (self.fixed is None) and (
            fixed is None
            or self.fixed is None
            or torch.equal(fixed.nan_to_num(-1.0), self.fixed.nan_to_num(-1.0))
        )
        if not same:
            raise RoutingError(
                "Cannot continue from a cache: expected the gates it was made with, got others. "
                "Read the text again."
            )

    def check_prefix(self, tokens: Tensor) -> None:
        """Refuse texts that do not begin with what was read.

        Args:
            tokens: The whole texts, (B, T) integer.

        Raises:
            RoutingError: If they are others.
        """
        if self.tokens is None:
            return
        length = self.tokens.shape[1]
        if tokens.shape[1] <= length or not torch.equal(tokens[:, :length], self.tokens):
            raise RoutingError(
                f"Cannot continue from a cache: expected texts that begin with the {length} tokens "
                "it was made of and go on, got others. Read the texts again."
            )

    def check_padding(self, mask: Tensor | None) -> None:
        """Refuse texts that were padded otherwise when they were read.

        Args:
            mask: 1 where there is text, (B, T) of the whole texts; None where that is everywhere.

        Raises:
            RoutingError: If other positions were read as padding.
        """
        if self.tokens is None:
            return
        begins = None if mask is None else mask[:, : self.tokens.shape[1]].bool()
        if begins is None or self.mask is None:
            same = self.mask is None and (begins is None or bool(begins.all()))
        else:
            same = torch.equal(begins, self.mask)
        if not same:
            raise RoutingError(
                "Cannot continue from a cache: expected the padding it was made with, got another. "
                "Pass the attention mask of the whole texts, or read them again."
            )

    def add(self, tokens: Tensor, mask: Tensor | None) -> None:
        """Note what was read, (B, t), and where there is text in all of it, (B, T) or None."""
        self.tokens = tokens if self.tokens is None else torch.cat([self.tokens, tokens], dim=1)
        self.mask = None if mask is None else mask.bool()

    def weigh(self, evidence: Tensor, starts: Tensor) -> None:
        """Note what every expert knew of the tokens that came.

        Args:
            evidence: `log p_e(x_t | x_<t)`, (B, t, E) nats.
            starts: True at a document's first token, (B, t): there the sum begins anew.
        """
        begun = starts.cumsum(1)
        found = (evidence * (begun == begun[:, -1:]).unsqueeze(-1)).sum(1)
        if self.evidence is not None:
            found += self.evidence.masked_fill(begun[:, -1:] > 0, 0.0)
        self.evidence = found

    def hold(self) -> None:
        """Keep each text's gates as they were at its last token."""
        if self.held is None and self.gates:
            self.held = self.gates[-1]

    def decide(self, experts: ExpertsPerText) -> None:
        """Choose once who goes on with each text, by what was read; nothing changes after that.

        Args:
            experts: So many of the best, see `narrow`, or "merged", see `merge`.
        """
        if experts == "merged":
            self.merge()
        else:
            self.narrow(experts)

    def narrow(self, count: int) -> None:
        """Go on with each text's best experts alone; their gates stay, renormalised.

        Best are those with the largest gates at the last token. One that goes on alone is who
        predicted the last document best, where a router reads evidence: gates answer for one
        token and for a mixture (docs/causal_lm.md has what each choice costs).

        Args:
            count: Experts that run on, at least 1; all of them go on as before.
        """
        if self.kept is not None or self.merged is not None or not self.gates:
            return
        gates, scores = self.gates[-1], self.evidence if count == 1 else None
        if scores is not None and self.fixed is not None:
            scores = torch.where(self.fixed.isnan(), scores, gates)
        self.choose(gates, count, scores)
        if self.kept is None:
            return
        batch = len(self.kept)
        texts = torch.arange(batch, device=self.kept.device)
        rows = (self.kept.t() * batch + texts).flatten()
        for layer in self.layers:
            if layer.is_initialized and layer.keys is not None and len(layer.keys) > batch:
                layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self.last = self.state = None  # the router is not asked again

    def merge(self, gates: Tensor | None = None) -> None:
        """Go on with one model for each text: the experts' changes, merged by its gates.

        Keys and values that were read become the same mean of the experts' own. To first order in
        the changes these are the merged model's. Nothing changes where experts were chosen before.

        Args:
            gates: (B, E), of a cache that has read nothing; those after the last token if None.

        Source: own definition; what it costs in loss is in docs/results/serve.md.
        """
        if self.kept is not None or self.merged is not None:
            return
        if gates is None:
            if not self.gates:
                return
            gates = self.gates[-1]
        self.held = self.merged = gates
        batch, count = gates.shape
        share = gates.t().reshape(count, batch, 1, 1, 1)
        for layer in self.layers:
            if layer.is_initialized and layer.keys is not None and len(layer.keys) > batch:
                layer.keys, layer.values = (
                    (part.unflatten(0, (-1, batch))[:count].float() * share).sum(0).to(part.dtype)
                    for part in (layer.keys, layer.values)
                )
        self.last = self.state = None

    def choose(self, gates: Tensor, count: int, scores: Tensor | None = None) -> None:
        """Keep each text's best experts; their gates stay, renormalised.

        Args:
            gates: (B, E).
            count: Experts that are kept, at least 1; nothing changes where that is all of them.
            scores: (B, E), higher is better; the gates if None.
        """
        if count >= gates.shape[1]:
            return
        order = gates if scores is None else scores
        self.kept = order.argsort(dim=-1, descending=True, stable=True)[:, :count]
        chosen = gates.gather(1, self.kept)
        # Equal shares where the router gave none of them anything.
        chosen = torch.where(chosen.sum(-1, keepdim=True) > 0, chosen, 1.0)
        chosen = chosen / chosen.sum(-1, keepdim=True)
        self.held = torch.zeros_like(gates).scatter(1, self.kept, chosen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make text b what text `beam_idx[b]` was, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these texts, (n,) int64, in this order."""
        if self.tokens is None:
            return
        batch = len(self.tokens)
        for cache in (self, self.base):
            for layer in [] if cache is None else cache.layers:
                if layer.is_initialized and layer.keys is not None:
                    rows = _spread(indices, batch, len(layer.keys))
                    layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self.tokens = self.tokens[indices]
        if self.state is not None:
            self.state = {name: tensor[indices] for name, tensor in self.state.items()}
        rows = (self.mask, self.fixed, self.kept, self.held, self.merged)
        self.mask, self.fixed, self.kept, self.held, self.merged = (
            None if part is None else part[indices] for part in rows
        )
        self.last = None if self.last is None else self.last[:, indices]
        self.gates = [gates[indices] for gates in self.gates]
        self.evidence = None if self.evidence is None else self.evidence[indices]
        self.columns = {name: column[indices] for name, column in self.columns.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every text, next to itself."""
        if self.tokens is not None:
            texts = torch.arange(len(self.tokens), device=self.tokens.device)
            self.batch_select_indices(texts.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a router's state cannot be taken back.

        Raises:
            RoutingError: If there is anything to take back.
        """
        if tokens_to_remove:
            raise RoutingError(
                "Cannot shorten the cache of a fused model: expected to read on, got "
                f"{abs(tokens_to_remove)} tokens to take back. Read the text again."
            )

    def reset(self) -> None:
        """Forget everything that was read."""
        super().reset()
        self.tokens = self.mask = self.state = None
        self.fixed = self.kept = self.held = self.merged = self.last = None
        self.base = None
        self.layers = _make_layers(self._config)
        self.gates, self.columns, self.evidence = [], {}, None


def _make_layers(config: Any) -> list[Any]:
    """A layer of keys and values for each block; plain ones grow in place."""
    layers = DynamicCache(config=config).layers
    return [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in layers]


def _spread(texts: Tensor, batch: int, rows: int) -> Tensor:
    """Rows of these texts among rows e * B + b."""
    starts = torch.arange(0, rows, batch, device=texts.device)
    return (starts[:, None] + texts).flatten()


def check_fused_cache(cache: Any) -> None:
    """Refuse a cache that is no `FusedCache`.

    Raises:
        RoutingError: If it is another.
    """
    if not isinstance(cache, FusedCache):
        raise RoutingError(
            f"Cannot read on: expected a cache of this model, got a {type(cache).__name__}. "
            "Let it make its own, or use make_cache()."
        )
