"""A base as a GGUF file: metadata, vocabulary and tensors, as llama.cpp reads them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from molora_fed.errors import BaseCheckpointError
from molora_fed.export.gguf_layout import GgufLayout
from molora_fed.models.base import Base
from molora_fed.models.base_files import find_file, load_json_file, stage_checkpoint
from molora_fed.types import Progress

__all__ = ["write_base", "write_tensors"]

_FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
_TENSOR_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_HEAD = "output.weight"
_MAX_HALF = float(np.finfo(np.float16).max)


def write_base(
    base: Base, layout: GgufLayout, file: Path, dtype: str, progress: Progress | None = None
) -> None:
    """Write a base as one GGUF file.

    Args:
        base: In float32.
        layout: Its layout.
        file: Target, in a folder that is whole or not there later.
        dtype: Of its matrices: float32, float16 or bfloat16; vectors are float32, as llama.cpp
            needs them.
        progress: Told the tensors that are written.

    Raises:
        BaseCheckpointError: If llama.cpp has no place for a tensor, or reads text otherwise than
            the base's tokenizer.
        OSError: On I/O errors.
    """
    import gguf

    writer = gguf.GGUFWriter(file, layout.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(base.id)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    layout.add_metadata(writer)
    _add_vocabulary(base, writer)
    tensors = _collect_tensors(base, layout)
    dtypes = {name: dtype if len(v.shape) > 1 else "float32" for name, v in tensors.items()}
    write_tensors(writer, {name: (v, dtypes[name]) for name, v in tensors.items()}, progress)


def write_tensors(
    writer: Any, tensors: dict[str, tuple[Tensor, str]], progress: Progress | None = None
) -> None:
    """Write a file's header, metadata and tensors, one tensor in memory at a time.

    Args:
        writer: A `gguf.GGUFWriter` with its metadata.
        tensors: Values and dtype by llama.cpp's name.
        progress: Told the tensors that are written.
    """
    import gguf

    for name, (values, dtype) in tensors.items():
        kind = gguf.GGMLQuantizationType[_TENSOR_TYPES[dtype]]
        size = values.numel() * (4 if dtype == "float32" else 2)
        shape = list(values.shape)
        # The numpy type decides nothing where the file's is given.
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, (values, dtype) in enumerate(tensors.values(), 1):
        writer.write_tensor_data(_convert(values, dtype))
        if progress is not None:
            progress(number, len(tensors))
    writer.close()


def _convert(values: Tensor, dtype: str) -> NDArray[Any]:
    """Numbers as they lie in the file."""
    import gguf

    plain: NDArray[Any] = values.detach().float().contiguous().numpy()
    if dtype == "float16":
        if float(np.abs(plain).max()) > _MAX_HALF:
            raise BaseCheckpointError(
                f"Cannot write the base in float16: expected numbers of at most {_MAX_HALF:g}, got "
                f"{float(np.abs(plain).max()):g}. Use --dtype bfloat16 or float32."
            )
        return plain.astype(np.float16)
    if dtype == "bfloat16":
        return gguf.quants.quantize(plain, gguf.GGMLQuantizationType.BF16)
    return plain


def _collect_tensors(base: Base, layout: GgufLayout) -> dict[str, Tensor]:
    """Tensors by llama.cpp's names, each parameter once."""
    model = base.model
    tensors: dict[str, Tensor] = {}
    for name, values in model.named_parameters():
        there = layout.find_name(name)
        if there in tensors:
            raise BaseCheckpointError(
                f"Cannot write base '{base.folder}' as GGUF: expected one tensor for '{there}', "
                f"got '{name}' besides another. Export with --to peft or --to merged."
            )
        tensors[there] = layout.order_rows(name.rpartition(".")[0], values.detach())
    if layout.needs_head and _HEAD not in tensors:  # tied to the embeddings
        tensors[_HEAD] = model.get_output_embeddings().weight.detach()
    return tensors


def _add_vocabulary(base: Base, writer: Any) -> None:
    """Tokens, merges, special tokens and chat template of a byte-level BPE tokenizer."""
    import gguf

    size = int(base.model.config.vocab_size)
    tokenizer = base.tokenizer
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_find_splitting(base))
    letters = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    types = [
        gguf.TokenType.UNUSED
        if number not in letters
        else gguf.TokenType.NORMAL
        if number not in added
        else gguf.TokenType.CONTROL
        if added[number].special
        else gguf.TokenType.USER_DEFINED
        for number in range(size)
    ]
    writer.add_token_list([letters.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types(types)
    with stage_checkpoint(base.folder) as stage:
        special = gguf.SpecialVocab(stage, load_merges=True, n_vocab=size)
    # A vocabulary of single bytes has no merges, and llama.cpp wants the list.
    special.merges = special.merges or ["Ġ Ġ"]
    special.add_special_token = {"bos": _adds_first(tokenizer)}
    special.add_to_gguf(writer, quiet=True)


def _adds_first(tokenizer: Any) -> bool:
    """Whether a text's tokens begin with one that is not of the text."""
    with_special = tokenizer("a")["input_ids"]
    return bool(len(with_special) > 1 and with_special[0] == tokenizer.bos_token_id)


def _find_splitting(base: Base) -> str:
    """llama.cpp's name of how text is split before merges.

    Raises:
        BaseCheckpointError: If the tokenizer is not byte-level BPE, or splits in another way.
    """
    file = find_file(base.folder, "tokenizer.json")
    content = {} if file is None else load_json_file(file)
    model = content.get("model") or {}
    steps = content.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers", []) if steps.get("type") == "Sequence" else [steps]
    normal = (content.get("normalizer") or {}).get("type", "NFC")
    digits = [part for part in parts if part.get("type") == "Digits"]
    bytes_ = [part for part in parts if part.get("type") == "ByteLevel"]
    is_plain = (
        model.get("type") == "BPE"
        and not model.get("byte_fallback")
        and not model.get("ignore_merges")
        and normal == "NFC"  # of texts in that form already, nothing changes
        and len(bytes_) == 1
        and bytes_[0].get("use_regex", True)
        and not bytes_[0].get("add_prefix_space")
    )
    if is_plain and len(parts) == 1:
        return "gpt-2"
    if is_plain and len(parts) == 2 and digits == parts[:1] and digits[0].get("individual_digits"):
        return "smollm"
    shown = json.dumps(
        {"model": model.get("type"), "split": [str(part.get("type")) for part in parts]}
    )
    raise BaseCheckpointError(
        f"Cannot write the tokenizer of '{base.folder}' as GGUF: expected byte-level BPE split as "
        f"GPT-2 or SmolLM split it, got {shown}. Export with --to peft, and convert that and the "
        "base with llama.cpp's own converters."
    )
