"""Texts in one running batch that join and leave between steps.

transformers batches texts of other lengths by padding on the left, and so does this: all running
texts end at the same column, a text that joins is padded up to the longest, and columns that only
padding is left in are cut off. A text sees its own columns alone, whoever stands beside it.

Texts for which all experts run, texts for which some do, and texts for which all are merged into
one model are batches of their own: their keys and values have other numbers of rows.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from molora_fed.errors import ConfigError, RoutingError
from molora_fed.inference.fused_cache import FusedCache, GrowingLayer
from molora_fed.inference.fused_lm import FusedForCausalLM
from molora_fed.types import ExpertsPerText

__all__ = ["PIECE_TOKENS", "Prediction", "PromptReading", "RunningBatch"]

PIECE_TOKENS = 128
"""Tokens of prompts that are read between two steps of the running texts."""


@dataclass(frozen=True)
class Prediction:
    """What a model says comes next in one text.

    Attributes:
        log_probs: Of the next token, (V,) float32 nats.
        gates: Of the experts behind it, (E,).
    """

    log_probs: Tensor
    gates: Tensor


@dataclass(eq=False)
class PromptReading:
    """A prompt that is read alone, piece by piece, before its text joins the others.

    Attributes:
        tokens: Its ids.
        gates: Gates in place of the router's, (E,), NaN where the router decides.
        cache: What was read.
        read: Tokens read so far.
        prediction: What comes after the prompt; None until it is read.
        has_joined: Whether texts continue it; they own its cache then.
    """

    tokens: tuple[int, ...]
    gates: Tensor
    cache: FusedCache
    read: int = 0
    prediction: Prediction | None = None
    has_joined: bool = False

    @property
    def tokens_left(self) -> int:
        """Tokens that are not read yet."""
        return len(self.tokens) - self.read


@dataclass(eq=False)
class _Texts:
    """Texts that are read together.

    Attributes:
        ids: Their ids, in the order of the rows.
        cache: What was read.
        mask: 1 where there is text, (B, T) int64.
    """

    ids: list[int]
    cache: FusedCache
    mask: Tensor


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows of a batch that go on, without the columns in which none of them has text.

    Attributes:
        ids: Their ids.
        rows: Their places in the batch, int64.
        count: Rows of the batch.
        first: The first column with text.
        length: Columns from there on.
        cache: The batch's.
        mask: The batch's.
    """

    ids: list[int]
    rows: Tensor
    count: int
    first: int
    length: int
    cache: FusedCache
    mask: Tensor

    @classmethod
    def of(cls, texts: _Texts, rows: Sequence[int]) -> "_Part":
        """These rows of a batch."""
        chosen = torch.tensor(rows, device=texts.mask.device)
        first = int(texts.mask[chosen].any(0).long().argmax())
        ids = [texts.ids[at] for at in rows]
        length = texts.mask.shape[1] - first
        return cls(ids, chosen, len(texts.ids), first, length, texts.cache, texts.mask)


@dataclass(eq=False)
class _Changes:
    """Who joins and leaves before the next step of a batch."""

    joining: list[_Texts] = field(default_factory=list)
    leaving: set[int] = field(default_factory=set)


class _Memory:
    """Two blocks for keys or values of each layer, in turn: one is read while one is written.

    Blocks of ever other sizes, taken from the system's heap, would leave holes that grow for hours.
    """

    def __init__(self) -> None:
        self._blocks: dict[tuple[int, str], list[Tensor]] = {}

    def take(self, layer: int, name: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Memory that nobody reads, of this shape; what it holds means nothing."""
        needed = math.prod(shape)
        turns = self._blocks.setdefault((layer, name), [])
        block = turns.pop(0) if len(turns) == 2 else None
        if block is None or len(block) < needed:
            block = like.new_empty(needed + needed // 4)
        turns.append(block)
        return block[:needed].view(shape)


class RunningBatch:
    """Reads many texts at once, each as if it were alone.

    Not thread-safe: one thread owns it, and the model.
    """

    def __init__(
        self,
        model: FusedForCausalLM,
        *,
        piece: int = PIECE_TOKENS,
        experts_per_text: ExpertsPerText | None = None,
    ) -> None:
        """Take a model.

        Args:
            model: Any model that `FusedForCausalLM` opens.
            piece: Tokens of a prompt that are read at once.
            experts_per_text: Who goes on with a text after its prompt, see `FusedCache.decide`; all
                experts if None. Texts whose given gates leave some out go on by those.

        Raises:
            ConfigError: If the base remembers its past otherwise than by keys and values.
            RoutingError: If the router reads the future of a text, or there is no such way to go
                on.
        """
        model.check_causal()
        model.check_experts_per_text(experts_per_text)
        for layer in model.make_cache().layers:
            if type(layer) not in (GrowingLayer, DynamicLayer, DynamicSlidingWindowLayer):
                raise ConfigError(
                    "Cannot serve this base: expected layers of attention, got "
                    f"{type(layer).__name__}, whose state cannot be padded. Use `molora generate`."
                )
        self._model = model
        self._piece = piece
        self._experts_per_text = experts_per_text
        self._batches: dict[int, _Texts] = {}
        self._memory: dict[int, _Memory] = {}
        self._changes: dict[int, _Changes] = {}
        self._place: dict[int, int] = {}
        self._next_id = 0

    def __len__(self) -> int:
        return len(self._place)

    @property
    def num_experts(self) -> int:
        """E, of gates."""
        return len(self._model.expert_names)

    def begin(self, tokens: Sequence[int], gates: Tensor | None = None) -> PromptReading:
        """Begin to read a prompt.

        Args:
            tokens: Its ids, at least one.
            gates: Gates in place of the router's, (E,); None lets the router decide.

        Raises:
            RoutingError: If there are no tokens, or the gates are not (E,).
        """
        if not tokens:
            raise RoutingError(
                "Cannot read a prompt: expected at least one token, got none. Begin with the "
                "end-of-text token."
            )
        fixed = torch.full((self.num_experts,), torch.nan) if gates is None else gates.float()
        if fixed.shape != (self.num_experts,):
            raise RoutingError(
                f"Cannot read a prompt: expected gates of shape ({self.num_experts},), got "
                f"{tuple(fixed.shape)}. Give one an expert."
            )
        return PromptReading(tuple(tokens), fixed.to(self._model.device), self._make_cache())

    def read_on(self, prompt: PromptReading) -> Prediction | None:
        """Read the next piece of a prompt.

        Returns:
            What comes after the prompt, once it is read to its end; None before.
        """
        piece = prompt.tokens[prompt.read : prompt.read + self._piece]
        output = self._model(
            input_ids=torch.tensor([piece], device=self._model.device),
            past_key_values=prompt.cache,
            gates=prompt.gates.unsqueeze(0),
            use_cache=True,
            logits_to_keep=1,
        )
        prompt.read += len(piece)
        if not prompt.tokens_left:
            prompt.prediction = Prediction(output.logits[0, -1], output.gates[0, -1])
            self._decide(prompt)
        return prompt.prediction

    def join(self, prompt: PromptReading, copies: int = 1) -> tuple[int, ...]:
        """Add texts that continue a prompt.

        Args:
            prompt: Read to its end; it can be continued here once.
            copies: How many texts.

        Returns:
            An id for each text, under which `step` wants its next token.

        Raises:
            RoutingError: If the prompt is not read to its end, or was continued before.
        """
        if prompt.prediction is None or prompt.has_joined:
            raise RoutingError(
                "Cannot continue a prompt: expected one read to its end and not continued yet, "
                f"got {prompt.tokens_left} tokens left. Read it, once for each time."
            )
        prompt.has_joined = True
        rows = tuple(range(self._next_id, self._next_id + copies))
        self._next_id += copies
        place = _find_place(prompt.cache)
        mask = torch.ones(1, len(prompt.tokens), dtype=torch.long, device=self._model.device)
        joining = self._find_changes(place).joining
        for row in rows:
            joining.append(_Texts([row], prompt.cache, mask))
            self._place[row] = place
        return rows

    def leave(self, rows: Iterable[int]) -> None:
        """Take texts out; their keys and values are freed before the next step."""
        for row in rows:
            self._find_changes(self._place.pop(row)).leaving.add(row)

    def step(self, tokens: Mapping[int, int]) -> dict[int, Prediction]:
        """Read one token of every running text.

        Args:
            tokens: The next token of each text, by its id.

        Returns:
            What comes next, by text.

        Raises:
            RoutingError: If the tokens are not those of all running texts.
        """
        if tokens.keys() != self._place.keys():
            raise RoutingError(
                f"Cannot read on: expected a token for each of {len(self._place)} texts, got "
                f"{len(tokens)}. Let texts that have ended leave."
            )
        found: dict[int, Prediction] = {}
        for place in [*self._changes]:
            self._apply_changes(place)
        for texts in self._batches.values():
            found |= self._read(texts, tokens)
        return found

    def _decide(self, prompt: PromptReading) -> None:
        """Choose who goes on with a prompt that is read to its end."""
        cache = prompt.cache
        if cache.kept is not None:  # given gates chose; held, as texts beside it have theirs
            cache.held = cache.fixed
        elif self._experts_per_text is not None and self.num_experts > 1:
            cache.decide(self._experts_per_text)

    def _read(self, texts: _Texts, tokens: Mapping[int, int]) -> dict[int, Prediction]:
        cache = texts.cache
        texts.mask = pad(texts.mask, (0, 1), value=1)
        chosen = torch.tensor([[tokens[row]] for row in texts.ids], device=self._model.device)
        output = self._model(
            input_ids=chosen,
            attention_mask=texts.mask,
            past_key_values=cache,
            gates=cache.fixed,
            use_cache=True,
            logits_to_keep=1,
        )
        del cache.gates[:-1]  # every step's are kept for who reads them; nobody does here
        logits, gates = output.logits[:, -1], output.gates[:, -1]
        return {row: Prediction(logits[at], gates[at]) for at, row in enumerate(texts.ids)}

    def _find_changes(self, place: int) -> _Changes:
        return self._changes.setdefault(place, _Changes())

    def _apply_changes(self, place: int) -> None:
        changes = self._changes.pop(place)
        running = self._batches.pop(place, None)
        parts = []
        for texts in [*([] if running is None else [running]), *changes.joining]:
            rows = [at for at, row in enumerate(texts.ids) if row not in changes.leaving]
            if rows:
                parts.append(_Part.of(texts, rows))
        if parts:
            memory = self._memory.setdefault(place, _Memory())
            self._batches[place] = self._put_together(parts, memory)
        else:
            self._memory.pop(place, None)

    def _put_together(self, parts: Sequence["_Part"], memory: _Memory) -> _Texts:
        """One batch of rows of several, padded on the left to the longest; they stay as they are.

        Every key and value is copied once, into memory that has room for more.

        Args:
            parts: The rows.
            memory: Of the batch that they become.
        """
        length = max(part.length for part in parts)
        total = sum(len(part.ids) for part in parts)
        whole = self._make_cache()

        def stack(columns: Sequence[Tensor]) -> Tensor:
            """Rows of columns (B, T, ...), all that a part has read; zeros before shorter ones."""
            result = columns[0].new_zeros(total, length, *columns[0].shape[2:])
            at = 0
            for part, column in zip(parts, columns, strict=True):
                chosen = column[part.rows, part.first :]
                result[at : at + len(chosen), length - part.length :] = chosen
                at += len(chosen)
            return result

        def gather(name: str, axis: int = 0) -> Tensor | None:
            """Rows of what each part's cache has of this name."""
            found = [getattr(part.cache, name) for part in parts]
            if found[0] is None:
                return None
            chosen = zip(found, parts, strict=True)
            return torch.cat([one.index_select(axis, part.rows) for one, part in chosen], axis)

        layers = zip(_layers_of(whole), *(_layers_of(part.cache) for part in parts), strict=True)
        for index, (target, *sources) in enumerate(layers):
            if not sources[0].is_initialized:
                continue
            rooms = []
            for name in ("keys", "values"):
                states = [getattr(source, name) for source in sources]
                make = partial(memory.take, index, name, states[0])
                rooms.append(_copy_states(states, parts, length, make))
            target.adopt((rooms[0], rooms[1]), length)
        whole.tokens = stack([_need(part.cache.tokens) for part in parts])
        whole.columns = {
            name: stack([part.cache.columns[name] for part in parts])
            for name in parts[0].cache.columns
        }
        if "document_starts" in whole.columns:
            # Padding is a document of its own.
            whole.columns["document_starts"][:, 0] = True
        if parts[0].cache.state is not None:
            whole.state = {
                name: torch.cat([_need(part.cache.state)[name][part.rows] for part in parts])
                for name in parts[0].cache.state
            }
        whole.fixed, whole.kept = gather("fixed"), gather("kept")
        whole.held, whole.last = gather("held"), gather("last", 1)
        whole.merged = gather("merged")
        whole.gates = [torch.cat([part.cache.gates[-1][part.rows] for part in parts])]
        ids = [row for part in parts for row in part.ids]
        mask = stack([part.mask for part in parts])
        whole.mask = None if bool(mask.all()) else mask.bool()
        return _Texts(ids, whole, mask)

    def _make_cache(self) -> FusedCache:
        """An empty cache whose layers keep all columns, those of sliding windows too.

        A window's mask hides what lies before it. Layers that drop it would have to agree on how
        much they dropped.
        """
        cache = self._model.make_cache()
        cache.layers = [GrowingLayer() for _ in cache.layers]
        cache.base = Cache(layers=[GrowingLayer() for _ in cache.layers])
        return cache


def _find_place(cache: FusedCache) -> int:
    """Of the batch of texts like this: experts that were kept, 0 for all, -1 for merged ones."""
    if cache.merged is not None:
        return -1
    return 0 if cache.kept is None else cache.kept.shape[1]


def _layers_of(cache: FusedCache) -> list[Any]:
    """All layers, those of a base beside a population last."""
    return [*cache.layers, *_need(cache.base).layers]


def _need(value: Any) -> Any:
    """What is there, for the type checker."""
    assert value is not None
    return value


def _copy_states(
    states: Sequence[Tensor],
    parts: Sequence[_Part],
    length: int,
    make: Callable[[tuple[int, ...]], Tensor],
) -> Tensor:
    """Keys or values of chosen rows of several batches, in memory with room for more.

    Args:
        states: Of each batch, (copies * B, H, T, D_head): rows e * B + b.
        parts: The rows.
        length: Columns that they get.
        make: Gives memory of a shape.

    Returns:
        (copies * N, H, size, D_head), with zeros before shorter texts.
    """
    total = sum(len(part.ids) for part in parts)
    split = [
        one.unflatten(0, (-1, part.count)) for one, part in zip(states, parts, strict=True)
    ]  # (copies, B, H, T, D_head)
    copies, _, heads, _, width = split[0].shape
    room = make((copies, total, heads, GrowingLayer.choose_room(length), width))
    at = 0
    for one, part in zip(split, parts, strict=True):
        after = at + len(part.ids)
        lack = length - part.length
        room[:, at:after, :, :lack] = 0.0  # hidden by the mask, but 0 * NaN is NaN
        room[:, at:after, :, lack:length] = one[:, part.rows, :, part.first :]
        at = after
    return room.flatten(0, 1)
