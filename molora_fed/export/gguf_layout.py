"""How llama.cpp names and orders what a base's layers hold, for the architectures known here.

Both keep their own order of the rows that rotary positions turn: Llama's two halves of a head are
interleaved there, and GPT-NeoX's queries, keys and values lie in three blocks instead of by head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molora_fed.errors import AdapterError, BaseCheckpointError
from molora_fed.export.subject import Specialist
from molora_fed.models.base import Base
from molora_fed.models.gguf_files import check_gguf

__all__ = ["KNOWN", "GgufLayout", "find_layout"]

KNOWN: Mapping[str, str] = {"llama": "llama", "gpt_neox": "gptneox"}
"""llama.cpp's name of each architecture that is known, by its model type."""
_TANH_GELU = frozenset({"gelu_new", "gelu_pytorch_tanh", "gelu_fast"})
_ENDINGS = (".weight", ".bias")


@dataclass(frozen=True, eq=False)
class GgufLayout:
    """Names, row orders and metadata of one base.

    Attributes:
        name: llama.cpp's name of the architecture.
        config: The base's config.
        notes: What differs there, a line each.
    """

    name: str
    config: Any
    notes: tuple[str, ...]
    _names: Any

    @property
    def needs_head(self) -> bool:
        """Whether llama.cpp wants a head of its own even if it is tied to the embeddings."""
        return self.name == "gptneox"

    def find_name(self, tensor: str) -> str:
        """llama.cpp's name of a tensor, from its full name in the base.

        Raises:
            BaseCheckpointError: If llama.cpp has no place for it.
        """
        found: str | None = self._names.get_name(tensor, try_suffixes=_ENDINGS)
        if found is None:
            raise BaseCheckpointError(
                f"Cannot write '{tensor}' as GGUF: expected a tensor of architecture "
                f"'{self.name}', got one that it has no place for. Export with --to peft or "
                "--to merged."
            )
        return found

    def order_rows(self, module: str, values: Tensor) -> Tensor:
        """Rows in llama.cpp's order.

        Args:
            module: Full name of the layer in the base.
            values: Its weight (D_out, D_in), its bias (D_out,), or a factor B (D_out, R).
        """
        part = module.rpartition(".")[2]
        heads = int(self.config.num_attention_heads)
        if self.name == "gptneox":
            if part != "query_key_value":
                return values
            order = torch.arange(len(values)).reshape(heads, 3, -1).swapaxes(0, 1)
        else:
            if part not in ("q_proj", "k_proj"):
                return values
            if part == "k_proj":
                heads = int(self.config.num_key_value_heads)
            order = torch.arange(len(values)).reshape(heads, 2, -1).swapaxes(1, 2)
        return values[order.reshape(-1)]

    def add_metadata(self, writer: Any) -> None:
        """Sizes and constants into a `gguf.GGUFWriter`."""
        config = self.config
        rope = config.rope_parameters
        head = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_freq_base(float(rope["rope_theta"]))
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
        if self.name == "gptneox":
            writer.add_parallel_residual(bool(config.use_parallel_residual))
            writer.add_layer_norm_eps(config.layer_norm_eps)
        else:
            writer.add_head_count_kv(config.num_key_value_heads)
            writer.add_key_length(head)
            writer.add_value_length(head)
            writer.add_layer_norm_rms_eps(config.rms_norm_eps)

    def check_adapter(self, specialist: Specialist) -> None:
        """Refuse what a LoRA file cannot hold, before anything is written.

        Raises:
            AdapterError: If it has dense differences, or changes a bias.
            BaseCheckpointError: If llama.cpp has no place for a module.
        """
        if not specialist.is_low_rank:
            raise AdapterError(
                f"Cannot write '{specialist.name}' as a GGUF LoRA: expected factors alone, got "
                "dense differences (kind delta). Use --rank R for factors that come near, or "
                "--to merged --as checkpoint and export that with --to gguf."
            )
        for module in specialist.adapter.updates:
            self.find_name(f"{module}.weight")


def find_layout(base: Base) -> GgufLayout:
    """The layout of a base.

    Raises:
        ConfigError: If the package `gguf` is not installed.
        BaseCheckpointError: If its architecture is not known, or uses what llama.cpp's has not.
    """
    what = f"Cannot write base '{base.folder}' as GGUF"
    check_gguf(what)
    import gguf

    config = base.model.config
    kind = str(config.model_type)
    if kind not in KNOWN:
        raise BaseCheckpointError(
            f"{what}: expected one of {', '.join(KNOWN)}, got '{kind}'. Export with --to peft, and "
            "convert that and the base with llama.cpp's own converters."
        )
    notes: list[str] = []
    faults = _find_faults(config)
    if faults:
        raise BaseCheckpointError(
            f"{what}: expected what llama.cpp's '{KNOWN[kind]}' computes, got "
            f"{', '.join(faults)}. Export with --to peft, and convert that and the base with "
            "llama.cpp's own converters."
        )
    if kind == "gpt_neox":
        if str(config.hidden_act) not in _TANH_GELU:
            notes.append(
                f"The base's activation is {config.hidden_act}; llama.cpp computes GELU by its "
                "tanh form, which is near it and not the same."
            )
        notes.append(
            "On a CPU llama.cpp reads GELU from a table of 16-bit numbers: log-probabilities of "
            "the built-in base differ by up to 0.001 nats for it."
        )
    name = KNOWN[kind]
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    return GgufLayout(
        name, config, tuple(notes), gguf.get_tensor_name_map(number, config.num_hidden_layers)
    )


def _find_faults(config: Any) -> list[str]:
    """What of a config llama.cpp's architecture of the same name does not compute."""
    rope = config.rope_parameters or {}
    faults = []
    if rope.get("rope_type", "default") != "default":
        faults.append(f"rope type '{rope['rope_type']}'")
    if config.model_type == "llama":
        if config.hidden_act != "silu":
            faults.append(f"activation '{config.hidden_act}'")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            faults.append("rotary positions on a part of each head")
    elif "gelu" not in str(config.hidden_act):
        faults.append(f"activation '{config.hidden_act}'")
    return faults
