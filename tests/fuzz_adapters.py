"""Adapter folders as other tools leave them, described by hand, and all that reads such a folder.

`tests/adapter_folders.py` has the folders themselves, made by PEFT; here a folder is its config and
the header of its tensors, whose numbers are all the same, as are those of the base.
"""

import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from fuzz_folders import Run, describe_files, encode_input, refuse_in_one_line, run_in_folder

from molora_fed.adapters.contract import LinearOptions
from molora_fed.adapters.convert import convert_adapter
from molora_fed.adapters.files import CONFIG_FILE, META_FILE, WEIGHTS_FILE, load_adapter
from molora_fed.adapters.headers import INDEX_FILE
from molora_fed.adapters.inspection import inspect_folder, report_on_base
from molora_fed.adapters.save import save_adapter
from molora_fed.charter import AdapterRules
from molora_fed.testing import build_random_adapter
from molora_fed.testing.models import build_tiny_model, build_tiny_tokenizer

__all__ = ["FOREIGN_WORDS", "prepare_foreign"]

_FILL = 61
_NUMBER = struct.unpack("<f", bytes([_FILL]) * 4)[0]
_PREFIX = "base_model.model."
_RULES = AdapterRules(max_rank=8, max_bytes=2**20)
_TIGHT_RULES = AdapterRules(kinds=("lora", "delta"), max_rank=2, max_bytes=4_000)
_LINEAR = {
    "llama": {
        f"model.layers.{n}.self_attn.{name}": shape
        for n in (0, 1)
        for name, shape in (("q_proj", (32, 32)), ("v_proj", (16, 32)))
    },
    "gpt_neox": {f"gpt_neox.layers.{n}.attention.query_key_value": (96, 32) for n in (0, 1)},
    "gpt2": {f"transformer.h.{n}.attn.c_attn": (96, 32) for n in (0, 1)},
}

FOREIGN_WORDS = (
    "llama", "gpt_neox", "gpt2", "check", "load", "convert", "report", "svd", "delta", "lora",
    "fill", "F16", "BF16", "I8", "F32", CONFIG_FILE, META_FILE, WEIGHTS_FILE, INDEX_FILE, "tensors",
    "link", "folder", "config.json", "adapter_model.bin", "adapters.safetensors", "shape", "dtype",
    "tokenizer.json", "q_proj", "v_proj", "lm_head", "all-linear", ".*q_proj", "(a|b)*c", "(?=x)",
    "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "use_dora",
    "exclude_modules", "layers_to_transform", "target_modules", "r", "lora_alpha", "bias", "pissa",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
    "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight",
    "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
)  # fmt: skip


def prepare_foreign(folder: Path) -> tuple[Sequence[bytes], Run]:
    """Whole folders, read by every entry point: `check`, `load`, `report` (with a base), `convert`.

    Most of them are refused, so a refusal is judged here.
    """
    bases = {name: _build_base(name) for name in _LINEAR}
    tokenizer = build_tiny_tokenizer()

    def read(place: Path, value: dict[str, Any]) -> None:
        base = bases.get(str(value.get("base")))
        kind, rank, out = value.get("kind"), value.get("rank"), folder / "out"
        kind = kind if isinstance(kind, str) else None
        rules = _TIGHT_RULES if value.get("rules") == "tight" else _RULES
        rank = min(max(rank, 1), 64) if isinstance(rank, int) else None
        has_base = base is not None

        def convert() -> None:
            if not value.get("again"):
                shutil.rmtree(out, ignore_errors=True)
            convert_adapter(
                place, out, model=base, tokenizer=tokenizer, kind=kind, rank=rank,
                drop_saved=bool(value.get("drop_saved")),
            )  # fmt: skip

        calls: dict[str, Callable[[], object]] = {
            "check": lambda: inspect_folder(place, has_base=has_base).to_json(),
            "load": lambda: load_adapter(place, rules=rules, model=base, tokenizer=tokenizer),
            "report": lambda: has_base and report_on_base(place, base, tokenizer=tokenizer),
            "convert": convert,
        }
        wanted = str(value.get("call"))
        with patch("os.fsync"):  # nothing of it has to outlast the machine
            for call in [calls[wanted]] if wanted in calls else calls.values():
                refuse_in_one_line(call)

    seeds = [*_describe_folders(), *_list_own(folder / "own", bases["llama"])]
    return seeds, run_in_folder(folder, read, most=2**21)


def _build_base(architecture: str) -> Any:
    """A tiny base whose parameters are all equal, so that a saved copy of one equals it."""
    model = build_tiny_model(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(_NUMBER)
    return model


def _describe_tensor(*shape: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape)}


def _list_factors(
    architecture: str = "llama",
    *,
    rank: int = 4,
    rename: Callable[[str], str] = str,
    reshape: Callable[[list[int]], list[int]] = list,
    dtype: str = "F32",
) -> dict[str, Any]:
    """Header of a LoRA of every module in `_LINEAR`."""
    found = {}
    for module, (rows, columns) in _LINEAR[architecture].items():
        for part, shape in (("A", [rank, columns]), ("B", [rows, rank])):
            key = rename(f"{_PREFIX}{module}.lora_{part}.weight")
            found[key] = _describe_tensor(*reshape(shape), dtype=dtype)
    return found


def _write_config(**changes: Any) -> dict[str, Any]:
    return {
        "json": {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "org/base",
            "peft_version": "0.17.0", "bias": "none", **changes,
        }
    }  # fmt: skip


def _describe(
    tensors: Mapping[str, Any] | None = None,
    *,
    files: Mapping[str, Any] | None = None,
    beside: Mapping[str, Any] | None = None,
    **config: Any,
) -> bytes:
    """A folder of a weights file and a config."""
    whole: dict[str, Any] = {CONFIG_FILE: _write_config(**config)}
    if tensors is not None:
        whole[WEIGHTS_FILE] = {"tensors": tensors, "fill": _FILL}
    return encode_input({**whole, **(files or {})}, **{"base": "llama", **(beside or {})})


def _shard(index: Mapping[str, Any] | None = None) -> dict[str, Any]:
    tensors = _list_factors()
    names = [f"adapter_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    places = {key: names[n % 2] for n, key in enumerate(tensors)}
    files: dict[str, Any] = {
        name: {
            "tensors": {k: e for k, e in tensors.items() if places[k] == name},
            "fill": _FILL,
        }
        for name in names
    }
    return {**files, INDEX_FILE: {"json": index or {"metadata": {}, "weight_map": places}}}


def _swap(before: str, after: str) -> Callable[[str], str]:
    return lambda key: key.replace(before, after, 1)


def _describe_folders() -> list[bytes]:
    return [*_list_read(), *_list_saved_along(), *_list_refused()]


def _list_read() -> list[bytes]:
    """What is read: names, patterns, shards, other architectures and kinds."""
    plain = _list_factors()
    factors = _list_factors
    shell = factors(rename=_swap("layers.0.", "layers.0.shell."))
    shell = {_swap("layers.1.", "layers.1.shell.")(key): entry for key, entry in shell.items()}
    vectors = {
        f"{_PREFIX}{m}.lora_magnitude_vector": _describe_tensor(rows)
        for m, (rows, _) in _LINEAR["llama"].items()
    }
    tools = ({"trainer_log.jsonl": "{}"}, {"axolotl.yml": "a"}, {"zero_to_fp32.py": ""},
             {"mergekit_config.yml": ""}, {"trainer_state.json": "{}"},
             {"torchtune_config.yaml": ""})  # fmt: skip
    return [
        _describe(plain),
        _describe(plain, beside={"base": "none"}),
        _describe(plain, files={META_FILE: {"json": {"kind": "lora", "frozen_depth": 0}}}),
        *(_describe(plain, files=files) for files in tools),
        _describe(plain, auto_mapping={"unsloth_fixed": True},
                  base_model_name_or_path="unsloth/base-bnb-4bit"),
        _describe(plain, base_model_name_or_path="/home/me/base", peft_version=None,
                  target_modules="all-linear", revision="main"),
        _describe(plain, target_modules=r".*\.self_attn\.(q|v)_proj", use_rslora=True),
        _describe(plain, rank_pattern={"q.proj": 4, r"layers\.0\..*": 4},
                  alpha_pattern={"^model.layers.0.self_attn.q_proj": 3, "v_proj": 5}),
        _describe(plain, target_modules="(?=x)", alpha_pattern={f"m{n}.x": 2 for n in range(66)}),
        _describe(plain, layers_to_transform=[0, 1], exclude_modules=["k_proj"]),
        _describe(plain, target_modules=["q_proj", "v_proj", "gate_up_proj"], fine_tune_type=""),
        _describe(plain, layers_to_transform=0, exclude_modules=r".*\.k_proj",
                  target_modules=["q_proj", "v_proj", "gate_up_proj"]),
        _describe(factors(dtype="F16"), lora_bias=False, use_next_thing=False),
        _describe(factors("gpt2"), target_modules=["c_attn"], fan_in_fan_out=True,
                  beside={"base": "gpt2", "kind": "svd", "rank": 2}),
        _describe(factors("gpt2"), target_modules=["c_attn"], fan_in_fan_out=True,
                  beside={"base": "none"}),
        _describe(files=_shard()),
        _describe(files=_shard(), beside={"base": "none"}),
        _describe({**plain, **vectors}, use_dora=True, beside={"kind": "svd", "rank": 4}),
        _describe({**plain, **vectors}, use_dora=True, beside={"kind": "delta"}),
        _describe(plain, beside={"kind": "delta"}),
        *(
            _describe(factors(rename=rename))
            for rename in (
                _swap(".weight", ".default.weight"), lambda key: _PREFIX + key,
                lambda key: key.removeprefix(_PREFIX), _swap("model.layers", "_orig_mod.layers"),
                lambda key: f"module.{key}", lambda key: key.removesuffix(".weight"),
                _swap(f"{_PREFIX}model.", f"{_PREFIX}model.language_model."),
                _swap("model.model.layers", "model.layers"),
            )
        ),
        _describe(shell),
        _describe(factors(rename=_swap(".lora_", ".linear.lora_")), target_modules=["linear"]),
    ]  # fmt: skip


def _list_own(folder: Path, model: Any) -> list[bytes]:
    """Adapters in this library's own form."""
    found = []
    for kind, precision in (("lora", "float32"), ("delta", "float32"), ("svd", "int4")):
        adapter = build_random_adapter(model, kind=kind, strength=1e-3)
        options = LinearOptions(precision=precision, group=8) if precision != "float32" else None
        save_adapter(adapter, model, folder / kind, options=options)
        files = describe_files(folder / kind)
        found += [encode_input(files, base=base) for base in ("llama", "none")]
        found.append(encode_input(files, base="llama", rules="tight"))
    return found


def _list_saved_along() -> list[bytes]:
    """Whole weights beside the factors: equal to the base's, other numbers, more rows."""
    plain, tensor = _list_factors(), _describe_tensor
    embedding, head = f"{_PREFIX}model.embed_tokens", f"{_PREFIX}lm_head"
    biases = {f"{_PREFIX}{m}.bias": tensor(rows) for m, (rows, _) in _LINEAR["gpt_neox"].items()}
    rows = {f"{embedding}.token_adapter.trainable_tokens_delta": tensor(2, 32)}
    tokens = {"added_tokens": [{"id": 257, "content": "<|im_start|>"}, {"id": 3}]}
    saved = {
        f"{embedding}.modules_to_save.default.weight": tensor(257, 32),
        f"{embedding}.original_module.weight": tensor(257, 32),
        f"{head}.weight": tensor(250, 32),
        f"{_PREFIX}model.norm.weight": tensor(32),
        f"{_PREFIX}model.layers.0.self_attn.q_proj.base_layer.weight": tensor(32, 32),
    }
    other = {WEIGHTS_FILE: {"tensors": {**plain, **saved}, "fill": 60}}
    return [
        _describe({**plain, **saved}, modules_to_save=["embed_tokens", "lm_head"]),
        _describe({**plain, **saved}, modules_to_save="lm_head", beside={"base": "none"}),
        _describe({**plain, **saved}, files=other, beside={"drop_saved": True}),
        _describe({**plain, **saved}, files=other),
        _describe({**plain, f"{_PREFIX}model.norm.weight": tensor(32)},
                  files={WEIGHTS_FILE: {"tensors": {**plain, f"{_PREFIX}model.norm.weight":
                                                    tensor(32)}, "fill": 60}}),
        _describe({**plain, f"{head}.weight": tensor(259, 32)},
                  files={"tokenizer.json": {"json": tokens}}),
        _describe({**plain, f"{head}.weight": tensor(259, 32)},
                  files={"tokenizer.json": {"json": []}}),
        _describe({**plain, f"{head}.weight": tensor(259, 31)}),
        _describe({**plain, f"{head}.weight": tensor(257, 32, dtype="F16")},
                  files={"tokenizer.json": "no JSON"}),
        _describe({**plain, f"{head}.weight": tensor(257, 32, dtype="I8")}),
        _describe({**plain, f"{_PREFIX}model.other.weight": tensor(4, 4)}),
        _describe({**plain, f"{_PREFIX}layers.0.self_attn.q_proj.weight": tensor(32, 32)}),
        _describe({**plain, f"{_PREFIX}self_attn.q_proj.weight": tensor(32, 32)}),
        _describe({**_list_factors("gpt_neox"), **biases}, bias="all",
                  target_modules=["query_key_value"], beside={"base": "gpt_neox"}),
        _describe({**_list_factors("gpt_neox"), **biases}, bias="all",
                  target_modules=["query_key_value"], beside={"base": "none"}),
        _describe({**plain, **rows}, trainable_token_indices=[3, 5]),
        _describe({**plain, **rows}, trainable_token_indices={"embed_tokens": [3, 5]},
                  files={WEIGHTS_FILE: {"tensors": {**plain, **rows}, "fill": 60}}),
        _describe({**plain, **rows}, trainable_token_indices=[3, 999]),
        _describe({**plain, **rows}, trainable_token_indices=[3, 5], beside={"base": "none"}),
    ]  # fmt: skip


def _list_refused() -> list[bytes]:
    plain, factors, tensor = _list_factors(), _list_factors, _describe_tensor
    first = f"{_PREFIX}model.layers.0.self_attn.q_proj"
    mlx = {"json": {"fine_tune_type": "lora", "model": "mlx-community/x", "lora_parameters": {}}}
    lower = _swap(".lora_", ".LORA_")

    def rename_mlx(key: str) -> str:
        key = key.removeprefix(_PREFIX).removesuffix(".weight")
        return key.replace("lora_A", "lora_a").replace("lora_B", "lora_b")

    folder = {
        "adapter": {"folder": 1},
        f"adapter/{CONFIG_FILE}": _write_config(),
        f"adapter/inner/{CONFIG_FILE}": _write_config(),
    }
    layers = {
        f"{first}.{part}.weight": tensor(4, 32)
        for part in ("lora_E", "lora_embedding_A", "lora_ranknum")
    }
    tower = _swap(f"{_PREFIX}model.", f"{_PREFIX}model.vision_tower.encoder.")
    cuts = [
        lambda s: [s[0] // 2, s[1]],
        lambda s: [s[0] * s[1]],
        lambda s: [0],
        lambda s: s[::-1],
        lambda s: [2, *s],
    ]
    return [
        *(_describe(factors(reshape=cut)) for cut in cuts),
        *(_describe(factors(reshape=cut), beside={"base": "none"}) for cut in cuts[:1]),
        _describe({}),
        _describe(files={"adapters.safetensors": {"tensors": factors(rename=rename_mlx)},
                         CONFIG_FILE: mlx}),
        _describe(files={"adapters.safetensors": ""}),
        _describe(factors(rename=rename_mlx)),
        _describe(factors(rename=lambda key: rename_mlx(key) + ".weight")),
        _describe(files={"adapter_model.bin": {"base64": "gAKK"}}),
        _describe({}, files={WEIGHTS_FILE: {"base64": "gAKKCmz8nEb5IGqoUBk="}}),
        _describe(files={k: v for k, v in _shard().items() if k != INDEX_FILE}),
        _describe(files={INDEX_FILE: {"json": {"weight_map": {"a": "../b.safetensors",
                                                              "c": "d.safetensors"}}}}),
        _describe(files={INDEX_FILE: {"json": {"weight_map": {"a": 1}}}}),
        _describe(files={**_shard({"weight_map": {"a": "e.safetensors"}}),
                         "e.safetensors": {"link": "adapter_model-00001-of-00002.safetensors"}}),
        _describe(files={**_shard(), "adapter_model-00002-of-00002.safetensors":
                         {"tensors": plain, "fill": _FILL}}),
        encode_input(folder, base="llama"),
        _describe(files=folder),
        _describe(),
        encode_input({"config.json": {"json": {}}}, base="none"),
        encode_input({"a": ""}, base="none"),
        encode_input({}, base="none"),
        _describe(files={WEIGHTS_FILE: {"link": "/etc/hostname"}}),
        _describe(plain, peft_type="PREFIX_TUNING"),
        _describe(plain, peft_type=None),
        _describe(plain, peft_type="LOHA"),
        _describe(plain, alora_invocation_tokens=[1]),
        _describe(plain, use_tomorrow=True, task_type="SEQ_CLS"),
        _describe(plain, task_type="SEQ_CLS"),
        _describe(plain, bias="some"),
        _describe(plain, init_lora_weights="pissa"),
        _describe(plain, r=0),
        _describe(plain, r=8),
        _describe(factors(rank=16), r=16),
        _describe(plain, target_modules=["q_proj"]),
        _describe(plain, target_modules=[1]),
        _describe(plain, target_modules=r".*\.q_proj"),
        _describe(plain, exclude_modules=["q_proj"]),
        _describe(plain, layers_to_transform=[1]),
        _describe(plain, alpha_pattern={"(?!x)": 3}),
        _describe(plain, alpha_pattern={"{,3}": 3}),
        _describe(plain, alpha_pattern={"(": 3}),
        _describe(plain, alpha_pattern={"x" * 3_000 + "*": 3}),
        _describe(plain, alpha_pattern={f"m{n}.x*": 2 for n in range(66)}),
        _describe(plain, exclude_modules="(?!x)"),
        _describe(plain, exclude_modules="x" * 3_000 + "*"),
        *(_describe({**plain, key: entry}) for key, entry in layers.items()),
        _describe({**plain, f"{first}.lora_B.bias": tensor(32)}),
        _describe({**plain, f"{_PREFIX}score.weight": tensor(2, 32)}),
        _describe({**plain, "v_head.summary.weight": tensor(1, 32)}),
        _describe({f"{_PREFIX}lm_head.weight": tensor(257, 32)}),
        _describe({**factors(rename=_swap(".weight", ".a.weight")),
                   **factors(rename=_swap(".weight", ".b.weight"))}),
        _describe({**plain, **factors(rename=lambda key: f"_orig_mod.{key}")}),
        _describe(dict(list(plain.items())[1:])),
        _describe(factors(rename=lower)),
        _describe({**plain, **factors(rename=tower)}),
        _describe(factors(rename=tower)),
        _describe({**plain, f"{_PREFIX}lm_head.lora_A.weight": tensor(4, 32),
                   f"{_PREFIX}lm_head.lora_B.weight": tensor(257, 4)}, target_modules="all-linear"),
        _describe(factors(rename=_swap("layers.1.", "layers.7."))),
        _describe(factors(rename=_swap(".self_attn.", ".mlp.experts.3."))),
        _describe(factors(rename=_swap("model.layers.0.", "model.layers.0.layers.0."))),
        _describe(factors(dtype="I8")),
        _describe(plain, files={WEIGHTS_FILE: {"tensors": plain, "fill": 0}}),
        _describe(plain, files={WEIGHTS_FILE: {"tensors": plain, "fill": 255}}),
        _describe(factors(rename=_swap("layers.", "language.layers.")),
                  alpha_pattern={"model.layers.0.self_attn.q_proj": 3}),
        _describe({**plain, "a b": tensor(1)}),
        _describe(plain, beside={"again": True}),
        _describe(plain, beside={"kind": "other"}),
        _describe(plain, beside={"kind": "svd", "base": "none"}),
        _describe(plain, beside={"rules": "tight"}),
        _describe(files=_shard(), beside={"rules": "tight"}),
        _describe(plain, files={CONFIG_FILE: {**_write_config(), "size": 2**20 + 1}}),
        _describe(files={WEIGHTS_FILE: {"folder": 1}}),
        _describe(factors(rename=_swap(".self_attn.", ".")), target_modules="all-linear"),
        _describe(factors(rename=_swap(".self_attn.", ".1.self_attn."))),
        # Found by hand while the seeds were written, and mended.
        *(_describe({**plain, f"{first}.lora_magnitude_vector": tensor(*shape)}, use_dora=True,
                    beside={"kind": "delta"}) for shape in ((), (3,), (32, 2))),
        _describe({**plain, f"{_PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta":
                   tensor()}, trainable_token_indices=[3]),
        _describe({**plain, f"{_PREFIX}lm_head.weight": tensor(259, 32)},
                  files={"tokenizer.json": {"json": {"added_tokens": 5}}}),
    ]  # fmt: skip
