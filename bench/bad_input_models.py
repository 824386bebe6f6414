"""Cases of bench/bad_input.py about models: devices, bases, GGUF files, adapters made elsewhere."""

import gzip
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bad_input_stage import Outcome, Stage
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from molora_fed.adapters.headers import CONFIG_FILE, META_FILE, WEIGHTS_FILE
from molora_fed.adapters.save import save_adapter
from molora_fed.storage.files import write_bytes
from molora_fed.testing.models import build_random_adapter, build_tiny_model, build_tiny_tokenizer
from molora_fed.types import WEIGHTS_INDEX

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from gguf_helpers import write_tiny_gguf  # noqa: E402

__all__ = ["run_joining_cases", "run_model_cases"]

TRAIN = "train --cooperative coop --domain abc --data {} --out out"
CONTRIBUTE = "contribute --cooperative coop --domain abc --data texts-abc --out out --adapter {}"
OLD_GPU = """
import contextlib
import torch

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.is_bf16_supported = lambda **options: False
torch.cuda.get_device_name = lambda device=None: "Old GPU"
"""
"""Run at the start of a process: torch sees a GPU from before bfloat16."""
LARGE = {
    "hidden_size": 16_384, "intermediate_size": 53_248, "num_hidden_layers": 126,
    "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128_256,
    "architectures": ["LlamaForCausalLM"],
}  # fmt: skip
"""405 thousand million parameters: 1.6 TB in float32."""
MOST_BYTES = 50_000_000
"""Of a file that a refused command may write."""
SLOW = {
    "nested repetitions": "((x{1,900}){1,900}){1,900}",
    "a back-reference": r"(a+)+\1$",
}
"""Patterns on which Python's own matching takes exponential time, or never begins."""
LINEAR = "(([a-z_0-9.]+)+)+!"
"""Exponential for Python, too, but linear for RE2."""
LONGEST_SECONDS = 120.0


def run_model_cases(stage: Stage) -> Iterator[Outcome]:
    """Cases that need no server."""
    yield from _run_device_cases(stage)
    yield from _run_base_cases(stage)
    yield from _run_adapter_cases(stage)
    _write_unreadable(stage.root / "unreadable")
    for how, arguments in (
        ("train", TRAIN.format("unreadable")),
        ("text check", "text check unreadable"),
        ("join", "join --server 127.0.0.1:1 --domain abc --data unreadable --home out --yes"),
    ):
        says = ("unreadable", "binary data", ".pdf")
        outcome = stage.refuse("folder of unreadable files", how, arguments, 12, says=says)
        left = [name for name in outcome.new_files if name.endswith((".json", ".pem"))]
        outcome.problems += [f"left {name}" for name in left]
        yield outcome
        shutil.rmtree(stage.root / "out", ignore_errors=True)


def run_joining_cases(stage: Stage, server: str) -> Iterator[Outcome]:
    """The same given to `molora join` at a running server: `HOST:PORT`."""
    join = f"join --server {server} --domain abc --data texts-abc --yes --threads 1 "
    home = "--home joining --name abc-2"
    for case, how, more, code, says in (
        ("GGUF file cut short", "join", "--base cut.gguf", 13, ("cut.gguf", "whole GGUF")),
        ("missing shard", "join, of a base", "--base shards", 13, ("-00002-of-00002",)),
        ("adapter of another architecture", "join", "--adapter llama", 21, ("gpt_neox",)),
        ("pattern made to be slow", "join", "--adapter slow-0", 20, ("linear time",)),
    ):
        absent = ["joining/contribution", *(["joining/base"] if "--base" in more else [])]
        yield stage.refuse(case, how, f"{join}{home} {more}", code, says=says, absent=absent)


def _run_device_cases(stage: Stage) -> Iterator[Outcome]:
    case, train = "dtype or device that is not there", TRAIN.format("texts-abc")
    folder = stage.root / "old-gpu"
    write_bytes(folder / "sitecustomize.py", OLD_GPU.encode())
    environment = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    yield stage.refuse(
        case, "bfloat16 on a GPU without it (a stand-in for the GPU)",
        f"{train} --device cuda --dtype bfloat16", 15,
        says=("bfloat16", "Old GPU", "--dtype float32"), absent=["out"], environment=environment,
    )  # fmt: skip
    yield stage.refuse(
        case, "a dtype that is never used", f"{train} --dtype float16", 15,
        says=("float16", "bfloat16"), absent=["out"],
    )  # fmt: skip
    if not torch.cuda.is_available():
        yield stage.refuse(
            case, "no GPU", f"{train} --device cuda", 15, says=("--device cpu",), absent=["out"]
        )


def _run_base_cases(stage: Stage) -> Iterator[Outcome]:
    create = "coop create other --folder out --base {}"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_BYTES, resource.RLIM_INFINITY))

    _write_large_base(stage.root / "large")
    for how, arguments in (
        ("coop create", create.format("large")),
        ("coop create, bfloat16", create.format("large") + " --dtype bfloat16"),
        ("train", TRAIN.format("texts-abc") + " --base large"),
    ):
        outcome = stage.refuse(
            "base larger than memory", how, arguments, 15, says=("large", "needs about", "free"),
            absent=["out"], before=limit,
        )  # fmt: skip
        yield outcome
    _write_shards(stage.root / "shards", stage.root / "base" / "model.safetensors", "model")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stage.root / "base" / name, stage.root / "shards")
    yield stage.refuse(
        "missing shard", "coop create", create.format("shards"), 13,
        says=("model-00002-of-00002",), absent=["out"],
    )  # fmt: skip
    whole = write_tiny_gguf(stage.root / "whole.gguf").read_bytes()
    write_bytes(stage.root / "cut.gguf", whole[: len(whole) // 2])
    yield stage.refuse(
        "GGUF file cut short", "coop create", create.format("cut.gguf"), 13,
        says=("cut.gguf", "whole GGUF"), absent=["out"],
    )  # fmt: skip


def _run_adapter_cases(stage: Stage) -> Iterator[Outcome]:
    _write_adapter(stage.root / "llama", "llama")
    yield stage.refuse(
        "adapter of another architecture", "contribute", CONTRIBUTE.format("llama"), 21,
        says=("llama", "gpt_neox", "another architecture"), absent=["out/contribution"],
    )  # fmt: skip
    shutil.rmtree(stage.root / "out", ignore_errors=True)
    _write_adapter(stage.root / "own", "gpt_neox")
    case = "pattern made to be slow"
    for number, (how, pattern) in enumerate(SLOW.items()):
        folder = _change_config(stage, f"slow-{number}", rank_pattern={pattern: 8})
        yield stage.refuse(
            case, f"adapter check, {how}", f"adapter check {folder} --base base", 20,
            says=("rank_pattern", "linear time"),
        )  # fmt: skip
    folder = _change_config(stage, "linear", rank_pattern={LINEAR: 8})
    yield _read_in_time(stage, case, f"adapter check {folder} --base base")
    _write_shards(stage.root / "parts", stage.root / "own" / WEIGHTS_FILE, "adapter_model")
    shutil.copy(stage.root / "own" / CONFIG_FILE, stage.root / "parts")
    yield stage.refuse(
        "missing shard", "adapter check", "adapter check parts", 20, says=("-00002-of-00002",)
    )


def _read_in_time(stage: Stage, case: str, arguments: str) -> Outcome:
    """A pattern that RE2 takes: the adapter is read, and soon."""
    there, began = stage.list_files(), time.monotonic()
    process = stage.start(arguments)
    _, err = process.communicate(timeout=LONGEST_SECONDS)
    outcome = stage.build_outcome(
        case, "adapter check, exponential for Python alone", arguments, (process.returncode, 0),
        err, there=there,
    )  # fmt: skip
    outcome.note = f"read in {time.monotonic() - began:.0f} s, the start of the command included"
    return outcome


def _change_config(stage: Stage, name: str, **values: Any) -> str:
    path = stage.copy("own", name) / CONFIG_FILE
    config = json.loads(path.read_bytes())
    write_bytes(path, json.dumps({**config, **values}).encode())
    return name


def _write_adapter(folder: Path, architecture: str) -> None:
    """An adapter as PEFT saves it."""
    model = build_tiny_model(architecture)
    save_adapter(build_random_adapter(model), model, folder)
    (folder / META_FILE).unlink()


def _write_shards(folder: Path, weights: Path, stem: str) -> None:
    """The first of two shards, and the index of both."""
    tensors = load_file(weights)
    names = sorted(tensors)
    half = len(names) // 2
    first, second = (f"{stem}-0000{number}-of-00002.safetensors" for number in (1, 2))
    folder.mkdir()
    save_file({name: tensors[name] for name in names[:half]}, folder / first, {"format": "pt"})
    places = {name: first if number < half else second for number, name in enumerate(names)}
    index = WEIGHTS_INDEX.replace("model", stem, 1)
    write_bytes(folder / index, json.dumps({"metadata": {}, "weight_map": places}).encode())


def _write_large_base(folder: Path) -> None:
    """A base of two bytes a parameter that are all holes: it takes no disk."""
    config = LlamaConfig(**LARGE)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in model.state_dict().items():
        begin, end = end, end + 2 * tensor.numel()
        entry = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    config.save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    path = folder / "model.safetensors"
    write_bytes(path, len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


def _write_unreadable(folder: Path) -> None:
    """Files of kinds that are read, none of which can be."""
    files: dict[str, bytes] = {
        "image.txt": bytes(range(256)) * 20,
        "cut.jsonl.gz": gzip.compress(b'{"text": "words"}\n' * 99)[:40],
        "table.parquet": b"PAR1 is not enough",
        "broken.jsonl": b'{"text": \n' * 5,
        "page.pdf": b"%PDF-1.7",
    }
    for name, content in files.items():
        write_bytes(folder / name, content)
    (folder / "gone.txt").symlink_to("nowhere")
