"""The fused model as a causal language model of transformers.

One class for everything that writes text: a fused model (a router mixes the experts' output
distributions), an evolved one (an adapter router mixes low-rank updates inside the layers), a
specialist, a base. Its logits are log-probabilities of the mixture, in nats.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import ModelOutput

from molora_fed.adapters.updates import LinearUpdate
from molora_fed.errors import RoutingError, ShapeError
from molora_fed.inference.expert_layers import put_experts_in
from molora_fed.inference.expert_pass import ExpertPass, Piece
from molora_fed.inference.fused_cache import FusedCache, check_fused_cache
from molora_fed.inference.fused_config import FusedConfig, find_config, make_router
from molora_fed.inference.fused_generation import FusedGenerationMixin
from molora_fed.inference.mixing import Mixer, OutputMixer, UpdateMixer
from molora_fed.models.base import Base
from molora_fed.plugins import Entry
from molora_fed.population.contract import AdapterRouter
from molora_fed.routing.contract import OutputRouter
from molora_fed.storage.compute import Compute
from molora_fed.storage.files import canonical_json, hash_bytes

__all__ = ["FusedForCausalLM", "FusedOutput"]

_POSITIONS = "max_position_embeddings"


@dataclass
class FusedOutput(ModelOutput):
    """What a fused model says about texts.

    Attributes:
        loss: Mean loss of the labels, nats; None without labels.
        logits: Log-probabilities of the next token, (B, t, V) float32 nats.
        past_key_values: What was read; None without a cache.
        gates: Gates of the experts at the positions of `logits`, (B, t, E).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: FusedCache | None = None
    gates: Tensor | None = None


class FusedForCausalLM(PreTrainedModel, FusedGenerationMixin):
    """Experts of one base and the router that mixes them, as one causal language model.

    It generates as any model of transformers does: greedily, by sampling, with beams, streaming;
    batches are padded on the left. It is for inference: nothing of it takes gradients.

    Example:
        model = FusedForCausalLM.from_pretrained("my-model")
        tokens = model.generate(**tokenizer(["def main("], return_tensors="pt"))

    Attributes:
        model: The base, whose linear layers hold all experts' changes.
        expert_names: Names of the experts, in the order of the gates.
        base: The base with its tokenizer; None where its weights are inside and no more is known.
        entry: Who registered the router; None if it was made by hand.
        expert_layers: Its linear layers, by full name in the base.
    """

    config_class = FusedConfig
    config: FusedConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    packed_bytes: ClassVar[int] = 4 * 2**30
    """Weights of linear layers up to so many bytes are packed on a processor: they take as much
    memory again, and a token far less time."""
    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {"router"}
    merge_after: ClassVar[int | None] = 32
    """Tokens that one expert decodes alone before it is merged into packed weights of its own, of
    one expert at a time; None never merges."""
    _is_stateful = True  # a router's state cannot be taken back
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: FusedConfig,
        *,
        model: Any = None,
        base: Base | None = None,
        router: OutputRouter | AdapterRouter | None = None,
        entry: Entry | None = None,
    ) -> None:
        """Build it, empty where no parts are given.

        Args:
            config: What it is made of.
            model: The base's model, changed in place: a copy made by `share_weights`; made if None.
            base: The base it is of, with its tokenizer and folder.
            router: The router; made of the config if None.
            entry: Who registered the router.
        """
        attention = config._attn_implementation
        super().__init__(config)
        if model is None:
            base_config = config.make_base_config()
            if attention is not None:
                base_config._attn_implementation = attention
            # In the dtype that is being loaded, whatever the base was in.
            dtype = torch.get_default_dtype()
            model = AutoModelForCausalLM.from_config(base_config, dtype=dtype)
        else:
            for module in model.modules():
                module._is_hf_initialized = True
        self.model = model
        self.base = base
        self.expert_names = tuple(str(expert["name"]) for expert in config.experts)
        self.entry = entry
        self.expert_layers = put_experts_in(model, config.plan(), len(self.expert_names))
        for layer in self.expert_layers.values():
            layer._is_hf_initialized = True
        if router is None and config.router is not None:
            router, self.entry = make_router(config, len(self.expert_names))
        self.router = router
        self._reads: frozenset[str] = frozenset()
        if router is not None:
            options: Any = router.options
            self._reads = frozenset(router.reads(options))
            for module in router.modules():
                module._is_hf_initialized = True
        self._alone: Tensor | None = None  # (1, E)
        self._owner: str | None = None
        self._tokenizer: Any = None if base is None else base.tokenizer
        self._pass = ExpertPass(self, self.expert_layers, self._reads)
        self._mixer: Mixer
        if isinstance(router, AdapterRouter):
            self._mixer = UpdateMixer(self._pass, router, self.get_input_embeddings())
        else:
            self._mixer = OutputMixer(self._pass, config, self.expert_names, router, self.entry)
        self.register_load_state_dict_post_hook(_forget_layout)
        self.post_init()

    def fill(self, updates: Sequence[Mapping[str, LinearUpdate] | None]) -> None:
        """Copy the experts' changes in.

        Args:
            updates: By full module name of the base, one mapping an expert; None is the base.
        """
        for name, layer in self.expert_layers.items():
            layer.fill([None if changes is None else changes.get(name) for changes in updates])

    # -- files ------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str] | None,
        *others: Any,
        base_folder: str | PathLike[str] | None = None,
        **settings: Any,
    ) -> Self:
        """Open a model in a local folder.

        Args:
            pretrained_model_name_or_path: A folder that `save_pretrained` wrote, or whatever
                `molora_fed.inference.opening.open_model` opens: a cooperative, a home, a run.
            others: See transformers.
            base_folder: Where the base is, where it is not inside; the recorded path if None.
            settings: See transformers; `dtype` and `device_map` among them.

        Raises:
            MoloraError: If the base is missing or another one; whatever loading it refuses.
        """
        if pretrained_model_name_or_path is None:  # made of a configuration and tensors alone
            made: Self = super().from_pretrained(None, *others, **settings)
            return made
        folder = Path(pretrained_model_name_or_path)
        config = settings.get("config") or find_config(folder)
        if config is not None and config.base_path is None:
            settings["local_files_only"] = True
            model: Self = super().from_pretrained(folder, *others, **settings)
            return model
        from molora_fed.inference.fused_build import open_causal_lm, open_saved

        compute, base = _read_compute(settings), None if base_folder is None else Path(base_folder)
        if config is None:
            return open_causal_lm(folder, base_folder=base, compute=compute)
        return open_saved(folder, config, base, compute)

    def save_pretrained(
        self, save_directory: str | PathLike[str], *, with_base: bool = True, **settings: Any
    ) -> None:
        """Write the model into a folder, and the tokenizer where it is known.

        Args:
            save_directory: The folder.
            with_base: Whether the base's weights are inside; without, the folder names the base by
                id, revision, fingerprints and relative path.
            settings: See transformers.

        Raises:
            RoutingError: If the base is to be named and is not known, or nothing is beside it.
        """
        folder = Path(save_directory)
        if with_base:
            super().save_pretrained(folder, **settings)
        else:
            if self.base is None:
                raise RoutingError(
                    f"Cannot save '{folder}' without the base: expected to know the base's folder, "
                    "got a model with the base inside. Save it with the base."
                )
            if not self.config.layers:
                raise RoutingError(
                    f"Cannot save '{folder}' without the base: expected experts beside it, got a "
                    "base or a specialist in one piece. Save it with the base."
                )
            path = os.path.relpath(self.base.folder.resolve(), folder.resolve())
            self.config.base_path = Path(path).as_posix()
            try:
                super().save_pretrained(folder, state_dict=self.list_own_tensors(), **settings)
            finally:
                self.config.base_path = None
        if self.base is not None:
            self.base.tokenizer.save_pretrained(folder)

    def list_own_tensors(self) -> dict[str, Tensor]:
        """What is not the base's: the experts' changes and the router's, by name."""
        own = (".a", ".b", ".dense", ".biases")
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if name.startswith("router.") or name.endswith(own)
        }

    # -- what transformers asks for ---------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        """The base's token embeddings."""
        found: nn.Module = self.model.get_input_embeddings()
        return found

    def get_output_embeddings(self) -> nn.Module:
        """The base's head."""
        found: nn.Module = self.model.get_output_embeddings()
        return found

    def get_decoder(self) -> Any:
        """What turns tokens into the states that enter the head."""
        return self.model.get_decoder()

    def _init_weights(self, module: nn.Module) -> None:
        """Factors begin at zero, where they were made; the base and the router begin as theirs."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def move(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        # A router's gates are made in its own dtype, whatever the layers' is.
        router = self._modules.pop("router", None)
        try:
            result = super()._apply(fn, recurse)
        finally:
            self._modules["router"] = router
        if router is not None:
            router._apply(move, recurse)
        self._pass.is_laid_out = False
        return result

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what decides the text: base, experts, router, dtype."""
        if self._owner is None:
            identity, made_from = self.config.base_identity, self.config.made_from
            if identity is None or made_from is None:  # made by hand
                identity, made_from = {"weights": "", "tokenizer": ""}, ["object", id(self)]
            sort, *parts = made_from
            base = [identity["weights"], identity["tokenizer"], str(self.dtype)]
            self._owner = hash_bytes(canonical_json([sort, *base, *parts]))
        return self._owner

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer.

        Raises:
            RoutingError: If the folder it was opened from has none.
        """
        if self._tokenizer is None:
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(
                    self.name_or_path, local_files_only=True
                )
            except (OSError, ValueError) as error:
                raise RoutingError(
                    f"Cannot read text with '{self.name_or_path}': expected a tokenizer beside the "
                    f"model, got {' '.join(str(error).split())[:200]}. Save the tokenizer there."
                ) from error
        return self._tokenizer

    @property
    def max_positions(self) -> int | None:
        """Tokens of the longest text it can read; None if its config sets no limit."""
        limit = getattr(self.config.make_base_config().get_text_config(), _POSITIONS, None)
        return None if limit is None else int(limit)

    @property
    def num_rows(self) -> int:
        """Rows of a pass for each text: experts, and the base where it is read and is none."""
        return self._pass.num_rows

    def check_causal(self) -> None:
        """Refuse to write with a router that reads the future of a text.

        Raises:
            RoutingError: If it does.
        """
        if isinstance(self.router, OutputRouter) and not self.router.causal:
            name = (self.config.router or {}).get("name")
            raise RoutingError(
                f"Cannot generate with router '{name}': expected a causal router, got one that "
                "reads the future of a text. Fuse with another router."
            )

    @contextmanager
    def alone(self, name: str) -> Iterator[Self]:
        """Be one expert for a while: one load evaluates every specialist and the fused model.

        Args:
            name: One of `expert_names`.

        Yields:
            This model, whose texts are that expert's where no gates are given; only it runs.

        Raises:
            RoutingError: If there is no such expert.
        """
        if name not in self.expert_names:
            raise RoutingError(
                f"Cannot be '{name}' alone: expected one of {', '.join(self.expert_names)}. "
                "Name an expert of this model."
            )
        before = self._alone
        index = self.expert_names.index(name)
        self._alone = torch.eye(len(self.expert_names))[index : index + 1]
        try:
            yield self
        finally:
            self._alone = before

    def make_cache(self) -> FusedCache:
        """An empty cache for this model."""
        return FusedCache(self.fingerprint, self.model.config)

    # -- reading ----------------------------------------------------------------------------

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FusedCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        document_starts: Tensor | None = None,
        gates: Tensor | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> FusedOutput | tuple[Any, ...]:
        """Read a piece of texts and say what comes next.

        Args:
            input_ids: Token ids that follow what the cache has read, (B, t).
            attention_mask: 1 where there is text, (B, T) over everything read; padding comes
                before a text.
            position_ids: (B, t); counted from the mask if None.
            past_key_values: What was read before.
            labels: (B, t); -100 is left out of the loss.
            use_cache: Whether to remember what was read; where a cache is given if None.
            logits_to_keep: So many of the last positions, or these ones; 0 is all.
            document_starts: True at a document's first token, (B, t); found by the end-of-text
                token if None.
            gates: Gates in place of the router's, (B, E), NaN in rows where the router decides;
                experts of gate 0 do not run where no text needs them.
            return_dict: Whether to return a `FusedOutput`; True if None.
            others: Ignored, as transformers passes what models of other kinds take.

        Raises:
            ShapeError: If `input_ids` is not (B, t >= 1).
            RoutingError: If the cache is another's, or the router reads the future of a text.
        """
        if input_ids is None or input_ids.ndim != 2 or input_ids.shape[1] < 1:
            raise ShapeError(
                "Cannot run fused model: expected token ids of shape (B, T) with T >= 1, got "
                f"{None if input_ids is None else tuple(input_ids.shape)}. Tokenize a text that "
                "is not empty."
            )
        if gates is None and self._alone is not None:
            gates = self._alone.to(input_ids.device).expand(len(input_ids), -1)
        if past_key_values is None and use_cache:
            past_key_values = self.make_cache()
        cache = past_key_values
        if cache is not None:
            check_fused_cache(cache)
            cache.check(self.fingerprint, gates, len(input_ids))
        piece = self._prepare(
            input_ids, attention_mask, position_ids, cache, logits_to_keep, document_starts
        )
        if not self._pass.is_laid_out:
            self._pass.lay_out()
        if cache is not None and cache.tokens is None:
            cache.fixed = gates
        logits, used = self._mixer.mix(piece, gates)
        if cache is not None:
            cache.add(piece.tokens, piece.mask)
            cache.gates.append(used[:, -1])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        output = FusedOutput(
            loss=loss, logits=logits, past_key_values=cache, gates=used[:, piece.keep]
        )
        if return_dict is False:
            found: tuple[Any, ...] = output.to_tuple()
            return found
        return output

    def _prepare(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: FusedCache | None,
        keep: int | Tensor,
        starts: Tensor | None,
    ) -> Piece:
        count = tokens.shape[1]
        before = 0 if cache is None else cache.get_seq_length()
        if mask is not None and tuple(mask.shape) != (len(tokens), before + count):
            raise ShapeError(
                f"Cannot run fused model: expected an attention mask of shape (B, T) = "
                f"{(len(tokens), before + count)}, got {tuple(mask.shape)}. Pass one of the whole "
                "texts."
            )
        if mask is not None and bool(mask.all()):
            mask = None
        if cache is not None:
            cache.check_padding(mask)
        if mask is not None and positions is None:
            positions = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -count:]
        elif mask is None and positions is not None and cache is not None:
            positions = None  # they follow from the cache
        if starts is None:
            starts = self._find_starts(tokens, mask, cache)
        kept: slice | Tensor = keep if isinstance(keep, Tensor) else slice(-keep or None, None)
        return Piece(tokens, starts, mask, positions, cache, kept)

    def _find_starts(self, tokens: Tensor, mask: Tensor | None, cache: FusedCache | None) -> Tensor:
        """True at a text's first token and after every end-of-text token, (B, t)."""
        end = self.config.document_end
        is_end = torch.zeros_like(tokens, dtype=torch.bool) if end is None else tokens == end
        starts = torch.empty_like(is_end)
        starts[:, 1:] = is_end[:, :-1]
        if cache is None or cache.tokens is None:
            starts[:, 0] = True
        else:
            starts[:, 0] = False if end is None else cache.tokens[:, -1] == end
        if mask is not None:
            before = torch.nn.functional.pad(mask, (1, 0))[:, -tokens.shape[1] - 1 : -1]
            starts |= (mask[:, -tokens.shape[1] :] > 0) & (before == 0)
        return starts


def _forget_layout(model: FusedForCausalLM, _: Any) -> None:
    """Weights have changed: what was packed of them is made again."""
    model._pass.is_laid_out = False
    model._owner = None


def _read_compute(settings: Mapping[str, Any]) -> Compute:
    """Where to run, of what transformers calls dtype and device_map."""
    chosen = {"dtype": settings.get("dtype"), "device": settings.get("device_map")}
    given = {name: str(value) for name, value in chosen.items() if value is not None}
    return Compute.model_validate({n: v.removeprefix("torch.") for n, v in given.items()})


AutoConfig.register("molora-fused", FusedConfig)
AutoModelForCausalLM.register(FusedConfig, FusedForCausalLM)
