"""One pass of the base with a row for every expert, and what the rows share."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn

from molora_fed.inference.attention import ATTENTION
from molora_fed.inference.expert_layers import ExpertLinear, find_shared_inputs
from molora_fed.inference.fused_cache import FusedCache
from molora_fed.inference.shared_inputs import Rows
from molora_fed.models.head import Head, find_readout
from molora_fed.models.layout import block_index, decoder_blocks
from molora_fed.models.states import can_resume, evaluating, resuming

if TYPE_CHECKING:
    from molora_fed.inference.fused_lm import FusedForCausalLM

__all__ = ["ExpertPass", "Piece"]


@dataclass(frozen=True)
class Piece:
    """One piece of the texts, on its way through a model.

    Attributes:
        tokens: (B, t) int64.
        starts: True at a document's first token, (B, t) bool.
        mask: 1 where there is text, (B, T) over all that was read; None where that is everywhere.
        positions: (B, t); None where they follow from the cache.
        cache: What was read before; None without one.
        keep: Positions whose distributions are wanted.
    """

    tokens: Tensor
    starts: Tensor
    mask: Tensor | None
    positions: Tensor | None
    cache: FusedCache | None
    keep: slice | Tensor


class ExpertPass:
    """Runs the base over pieces of texts, a row for every expert and text.

    Blocks below the first that anybody changes run once for all experts.

    Attributes:
        layers: The base's linear layers with all experts' changes, by full name.
        is_laid_out: Whether what layers share has been found since weights last moved.
        prefix: What entered the block at the frozen depth in the last pass, (rows, t, D).
        shared_depth: Blocks whose output the base's own pass makes for a population's, too.
    """

    def __init__(
        self, owner: "FusedForCausalLM", layers: dict[str, ExpertLinear], reads: frozenset[str]
    ) -> None:
        """Take a model's parts.

        Args:
            owner: The model.
            layers: Its linear layers, by full name in the base.
            reads: Columns that its router reads.
        """
        self._owner = owner
        self._model: Any = owner.model
        self._config = owner.config
        self._names = owner.expert_names
        self._reads = reads
        self.layers = layers
        self.is_laid_out = False
        self.prefix: Tensor | None = None
        self.shared_depth = 0
        self._shared: Tensor | None = None
        self._lone: tuple[ref[FusedCache], int] | None = None
        self._handles: list[Any] = []
        self._copies = self._batch = 1

    def run_experts(self, piece: Piece, chosen: Tensor | None) -> Tensor:
        """States that enter the head, (k, B, t, D); a row for the base is last if it is read."""
        batch = len(piece.tokens)
        if chosen is None:
            count = len(self._names) + self.has_base_row
            owners = torch.arange(count, device=piece.tokens.device).repeat_interleave(batch)
            is_folded = not self.has_base_row
        else:
            count, is_folded = chosen.shape[1], False
            owners = chosen.t().flatten()
        rows = Rows(
            expert=owners,
            num_experts=len(self._names),
            is_folded=is_folded,
            merged=self._find_merged(self._find_lone(chosen), piece),
        )
        hidden = self.run(rows, piece, count, piece.cache)
        return hidden.unflatten(0, (count, batch))

    def run_merged(self, piece: Piece, weights: Tensor) -> Tensor:
        """States that enter the head, (B, t, D), of one model a text.

        Args:
            piece: The piece.
            weights: Of the experts' changes, added up inside the layers, (B, E).
        """
        same = weights[0].tolist() if bool((weights == weights[0]).all()) else None
        rows = Rows(
            gates=weights[:, None].expand(-1, piece.tokens.shape[1], -1),
            num_experts=len(self._names),
            merged=self._find_merged(None if same is None else tuple(same), piece),
        )
        return self.run(rows, piece, 1, piece.cache)

    def _find_lone(self, chosen: Tensor | None) -> tuple[float, ...] | None:
        """Weights of the one expert that all texts have, (E,); None where there are others."""
        experts = set() if chosen is None else set(chosen.flatten().tolist())
        if len(experts) != 1:
            return None
        return tuple(float(expert in experts) for expert in range(len(self._names)))

    def _find_merged(
        self, weights: tuple[float, ...] | None, piece: Piece
    ) -> tuple[float, ...] | None:
        """These weights, once they have decoded alone for so long that merging by them pays.

        Tokens are counted from one cache's last longer piece on, so that the same texts are read
        with the same weights whatever was read before, and two caches in turn merge nothing.
        """
        cache, limit = piece.cache, self._owner.merge_after
        if cache is None or limit is None or weights is None or piece.tokens.shape[1] > 1:
            self._lone = None
            return None
        is_same = self._lone is not None and self._lone[0]() is cache
        steps = 1 + (self._lone[1] if is_same and self._lone is not None else 0)
        self._lone = ref(cache), steps
        return weights if steps > limit else None

    def run(self, rows: Rows, piece: Piece, count: int, cache: Any) -> Tensor:
        """States that enter the head, (count * B, t, D)."""
        rows.positions = piece.tokens.shape[1]
        self._copies, self._batch = count, len(piece.tokens)
        for layer in self.layers.values():
            layer.__dict__["rows"] = rows  # past what a module looks up when it is given something

        def spread(value: Tensor | None) -> Tensor | None:
            return value if value is None or count == 1 else value.repeat(count, 1)

        output = self._model.get_decoder()(
            input_ids=spread(piece.tokens),
            attention_mask=spread(piece.mask),
            position_ids=spread(piece.positions),
            past_key_values=cache,
            use_cache=cache is not None,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def run_on(self, rows: Rows, piece: Piece) -> Tensor:
        """What `run` gives, (B, t, D), after a pass of the base over the same piece.

        Blocks that nobody changes are not run again.
        """
        depth, cache = self.shared_depth, piece.cache
        if not depth or (cache is not None and not cache.skip(depth, 0)):
            return self.run(rows, piece, 1, cache)
        assert self._shared is not None
        with resuming(self._model, depth, self._shared):
            hidden = self.run(rows, piece, 1, cache)
        if cache is not None:
            cache.skip(depth, piece.tokens.shape[1])
        return hidden

    def compute_logprob(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of states, (..., D) to (..., V) float32 nats."""
        logits = self._head.compute_logits(hidden).float()
        # In place: for many tokens, fresh memory takes as long as the normalising.
        return torch.log_softmax(logits, dim=-1, out=logits)

    def lay_out(self) -> None:
        """Find what the layers share, once weights are where they stay, and pack them."""
        layers = list(self.layers.values())
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for layer in layers:
            layer.group = None
            layer.rows = Rows()
        num_bytes = sum(layer.weight.nbytes for layer in layers)
        is_cpu = self._owner.device.type == "cpu"
        if is_cpu and num_bytes <= self._owner.packed_bytes:
            for group in find_shared_inputs(self._model, layers):
                for layer in group.layers:
                    layer.group = group
        with evaluating(self._model):
            readout = find_readout(self._model)
        self._head = Head(self._model.get_decoder(), self._model.get_output_embeddings(), readout)
        own_config = self._model.config
        if is_cpu and own_config._attn_implementation == "sdpa":
            own_config._attn_implementation_internal = ATTENTION
        self._share_blocks()
        self.is_laid_out = True

    @property
    def num_rows(self) -> int:
        """Rows of a pass for each text: experts, and the base where it is read and is none."""
        if self._config.mixes == "updates":
            return 1 + ("base_hidden" in self._reads)
        return len(self._names) + self.has_base_row

    @property
    def has_base_row(self) -> bool:
        """Whether the base runs beside the experts, because it is read and is none of them."""
        return "base_hidden" in self._reads and self.base_row == len(self._names)

    @property
    def base_row(self) -> int:
        """The expert that is the base itself; one more than there are if none is."""
        changing = {
            expert
            for layer in self._config.layers.values()
            for expert, rank in enumerate(layer["ranks"])
            if rank is not None
        }
        unchanged = [e for e in range(len(self._names)) if e not in changing]
        return unchanged[0] if unchanged else len(self._names)

    def _share_blocks(self) -> None:
        """Let the first blocks, which nobody changes, run once for all experts."""
        prefix, blocks = decoder_blocks(self._model)
        changed = [block_index(name, prefix) for name in self._config.layers]
        depth = min((index for index in changed if index is not None), default=0)
        reuses = getattr(self._model.config.get_text_config(), "num_kv_shared_layers", None)
        is_one = len(self._names) == 1 or self._config.mixes == "updates"
        add = self._handles.append
        if "prefix_hidden" in self._reads:
            block = blocks[self._config.frozen_depth]
            add(block.register_forward_pre_hook(self._keep_prefix, with_kwargs=True))
        self.shared_depth = 0
        is_read_first = self._config.mixes == "updates" and "base_hidden" in self._reads
        if is_read_first and depth and not reuses and can_resume(self._model, depth):
            self.shared_depth = depth
            add(blocks[depth].register_forward_pre_hook(self._keep_shared, with_kwargs=True))
        if depth and not reuses and not is_one:
            for block in blocks[:depth]:
                add(block.register_forward_pre_hook(self._collapse, with_kwargs=True))
            add(blocks[depth].register_forward_pre_hook(self._spread, with_kwargs=True))

    def _keep_prefix(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.prefix = args[0] if args else kwargs["hidden_states"]

    def _keep_shared(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._shared = args[0] if args else kwargs["hidden_states"]

    def _collapse(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Keep one expert's rows of everything a shared block is given."""
        rows = self._copies * self._batch

        def take(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(take(part) for part in value)
            # Position vectors (T,) have no rows, whatever their length.
            is_rows = isinstance(value, Tensor) and value.ndim > 1 and len(value) == rows
            return value[: self._batch] if is_rows else value

        return take(args), {name: take(value) for name, value in kwargs.items()}

    def _spread(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Repeat the shared blocks' result for every expert."""

        def repeat(hidden: Tensor) -> Tensor:
            return hidden.repeat(self._copies, 1, 1)

        if args:
            return (repeat(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": repeat(kwargs["hidden_states"])}
