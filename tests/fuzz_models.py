"""Good adapters, samples and base checkpoints, and the functions that read them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_folders import (
    Run,
    describe_files,
    encode_input,
    replacing,
    run_in_folder,
    write_files,
)
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from molora_fed.adapters.carried_files import encode_carried, load_carried
from molora_fed.adapters.contract import LinearOptions
from molora_fed.adapters.files import CONFIG_FILE, META_FILE, WEIGHTS_FILE, load_adapter
from molora_fed.adapters.save import save_adapter
from molora_fed.charter import AdapterRules
from molora_fed.corpus.blocks import Blocks, load_blocks
from molora_fed.models.base import load_base, write_card
from molora_fed.testing import build_random_adapter
from molora_fed.testing.models import build_tiny_checkpoint, build_tiny_model
from molora_fed.types import Split

__all__ = [
    "ADAPTER_WORDS",
    "BASE_WORDS",
    "prepare_adapter",
    "prepare_adapters",
    "prepare_base",
    "prepare_bases",
    "prepare_carried",
    "prepare_sample_folders",
    "prepare_samples",
]

_RULES = AdapterRules(max_rank=8, max_bytes=2**20)
_TIGHT_RULES = AdapterRules(kinds=("lora", "delta"), max_rank=2, max_bytes=2_000)


def prepare_adapter(kind: str, precision: str, file: str):
    def prepare(folder: Path) -> tuple[Sequence[bytes], Run]:
        model = build_tiny_model("gpt_neox")
        path = _save_adapter(folder / "adapter", model, kind, precision) / file
        seeds = [path.read_bytes()]
        return seeds, replacing(path, lambda: load_adapter(folder / "adapter", rules=_RULES))

    return prepare


def _save_adapter(folder: Path, model: Any, kind: str, precision: str) -> Path:
    adapter = build_random_adapter(model, kind=kind, strength=1e-3)
    options = LinearOptions(precision=precision, group=8) if precision != "float32" else None
    save_adapter(adapter, model, folder, options=options)
    return folder


ADAPTER_WORDS = (
    "lora", "svd", "delta", "LORA", "quantised", "F16", "BF16", "F32", "U8", "F64", CONFIG_FILE,
    META_FILE, WEIGHTS_FILE, "tensors", "link", "folder", "size", "base64", "PK\x03\x04", "rules",
    "tight", "base", "none", "modules", "bias", "rank_pattern", "use_rslora",
)  # fmt: skip


def prepare_adapters(folder: Path) -> tuple[Sequence[bytes], Run]:
    model = build_tiny_model("gpt_neox")

    def load(place: Path, value: dict[str, Any]) -> None:
        rules = {"rules": _RULES, "base": _RULES, "tight": _TIGHT_RULES}.get(
            str(value.get("rules"))
        )
        load_adapter(place, rules=rules, model=model if value.get("rules") == "base" else None)

    seeds = []
    for kind, precision in (
        ("lora", "float32"), ("delta", "float32"), ("delta", "int8"), ("svd", "int4"),
    ):  # fmt: skip
        saved = _save_adapter(folder / f"{kind}-{precision}", model, kind, precision)
        files = describe_files(saved)
        for entry in files.values():
            entry |= {"size": 0}
        seeds += [encode_input(files, rules=rules) for rules in ("base", "rules")]
    return seeds, run_in_folder(folder, load)


def prepare_samples(folder: Path) -> tuple[Sequence[bytes], Run]:
    tokens = np.arange(48, dtype=np.int32).reshape(3, 16)
    blocks = Blocks("legal", Split.ADMISSION, tokens, tokens * 0, tokens * 0)
    path = folder / "sample.safetensors"
    return [blocks.to_bytes()], replacing(path, lambda: load_blocks(path, max_bytes=2**20))


def prepare_carried(folder: Path) -> tuple[Sequence[bytes], Run]:
    tensors = {"gates.0": torch.arange(6.0).reshape(2, 3), "gates.1": torch.ones(3).bfloat16()}
    path = folder / "carried.safetensors"
    run = replacing(path, lambda: load_carried(path, "gates", who="ann", max_bytes=2**16))
    return [encode_carried(tensors)], run


def prepare_sample_folders(folder: Path) -> tuple[Sequence[bytes], Run]:
    tokens = np.arange(48, dtype=np.int32).reshape(3, 16)
    Blocks("legal", Split.ADMISSION, tokens, tokens, tokens).save(folder / "a.safetensors")
    files = describe_files(folder)
    files["a.safetensors"] |= {"size": 0}
    return [encode_input(files)], run_in_folder(
        folder, lambda place, value: load_blocks(place / "a.safetensors", max_bytes=2**20)
    )


def prepare_base(file: str):
    def prepare(folder: Path) -> tuple[Sequence[bytes], Run]:
        base = build_tiny_checkpoint(folder / "base", "gpt_neox", 0)
        path = base / file
        return [path.read_bytes()], replacing(path, lambda: load_base(base))

    return prepare


BASE_WORDS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "config.json",
    "tokenizer.json", "base.json", "weight_map", "model-00001-of-00002.safetensors", "tensors",
    "_attn_implementation", "attn_implementation", "org/kernel", "sdpa", "F16", "I8", "link",
    "folder", "size", "num_hidden_layers", "llama", "auto_map", "vocab_size",
)  # fmt: skip


def prepare_bases(folder: Path) -> tuple[Sequence[bytes], Run]:
    """Bases of a few numbers: one file behind a link, and several with an index and a card."""
    characters = {letter: number for number, letter in enumerate("abcdefgh")}
    tokens = Tokenizer(BPE(vocab={**characters, "<end>": 8}, merges=[]))
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = GPTNeoXConfig(**sizes, num_attention_heads=1, max_position_embeddings=16)
    seeds = []
    for shard in ("1GB", "1KB"):
        saved, place = folder / f"saved-{shard}", folder / f"base-{shard}"
        GPTNeoXForCausalLM(config).save_pretrained(saved, max_shard_size=shard)
        PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>").save_pretrained(saved)
        files = describe_files(saved)
        if shard == "1GB":
            files["files/weights"] = files.pop("model.safetensors")
            files["model.safetensors"] = {"link": "files/weights"}
        else:
            write_files(files, place)
            write_card(place, "tiny", "1", None)
            files["base.json"] = describe_files(place)["base.json"]
        files["config.json"] |= {"size": 0}
        seeds.append(encode_input(files))
    return seeds, run_in_folder(folder, lambda place, value: load_base(place))
