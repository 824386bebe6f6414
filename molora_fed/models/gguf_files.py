"""A base from a GGUF file: its weights made plain again and kept in bfloat16."""

from collections import Counter
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from molora_fed.errors import BaseCheckpointError, ConfigError
from molora_fed.models.base_files import quiet_transformers
from molora_fed.models.runtime import check_memory
from molora_fed.storage.untrusted import clean

__all__ = ["GGUF_SUFFIX", "check_gguf", "convert_gguf"]

GGUF_SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_NUMBERS_A_BYTE = 4  # of the shortest formats, two bits a number


def convert_gguf(file: Path, folder: Path) -> str:
    """Write a GGUF file's model and tokenizer as a plain checkpoint in bfloat16.

    The same file gives the same bytes, so whoever converts it has the same fingerprints.

    Args:
        file: A causal language model that transformers can read.
        folder: An empty folder.

    Returns:
        What was done to the weights, e.g. "dequantised from Q4_1, saved in bfloat16".

    Raises:
        ConfigError: If the package `gguf` is not installed.
        BaseCheckpointError: If the file is cut short, malformed, or of a model that cannot be read.
        ComputeError: If there is too little memory.
    """
    what = f"Cannot read '{file}'"
    check_gguf(what)
    try:
        with file.open("rb") as stream:
            if stream.read(len(_MAGIC)) != _MAGIC:
                raise ValueError("another kind of file")
        size = file.stat().st_size
        check_memory(
            size * _NUMBERS_A_BYTE * torch.float32.itemsize,
            torch.device("cpu"),
            what=what,
            fix="Use a machine with more memory, or a checkpoint of safetensors files.",
        )
        return _convert(file, folder)
    except (BaseCheckpointError, ConfigError):
        raise
    except Exception as error:  # both packages raise many kinds on malformed files
        raise BaseCheckpointError(
            f"{what}: expected a whole GGUF file of a causal language model, got "
            f"{type(error).__name__}: {clean(error, 200)}. Download it again, or use a checkpoint "
            "of safetensors files."
        ) from error


def check_gguf(what: str) -> None:
    """Check that the package for GGUF files is there.

    Args:
        what: What it is needed for, as the start of an error.

    Raises:
        ConfigError: If it is not installed.
    """
    if find_spec("gguf") is None:
        raise ConfigError(
            f"{what}: expected the package gguf, got none. Run `pip install molora-fed[gguf]`."
        )


def _convert(file: Path, folder: Path) -> str:
    import gguf

    reader = gguf.GGUFReader(file)
    kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1)
    place: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    # transformers shows a bar of its own, which only closing the stream silences.
    with quiet_transformers(), redirect_stderr(StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent), dtype=torch.float32, trust_remote_code=False, **place
        )
        tokenizer = AutoTokenizer.from_pretrained(
            str(file.parent), trust_remote_code=False, **place
        )
        # Its config says that it is quantised, which it is no more.
        config = model.config
        for key in ("quantization_config", "_pre_quantization_dtype"):
            config.__dict__.pop(key, None)
        config._name_or_path = ""
        plain = type(model)(config).to(torch.bfloat16)
        plain.load_state_dict(model.state_dict())
        plain.tie_weights()
        plain.config.dtype = torch.bfloat16
        if model.generation_config is not None:
            plain.generation_config = model.generation_config
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    ((kind, _),) = kinds.most_common(1)
    return f"dequantised from {kind}, saved in bfloat16"
