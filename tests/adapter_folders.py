"""Adapter folders as tools leave them: made by PEFT itself, and by hand like what others write.

Each `Case` builds a folder for a tiny random base and says what becomes of it: read without loss,
with the logits that PEFT gives for `reference`, or refused with a cause and a repair.
"""

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from molora_fed.testing.models import build_tiny_model, build_tiny_tokenizer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|v_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|"
    r"feed_forward|ffn|dense)\.(?:(?:q_proj|v_proj|up_proj)))"
)


@dataclass(frozen=True)
class Case:
    """One adapter folder.

    Attributes:
        name: What is special about it.
        made_by: The tool that leaves such folders.
        build: Writes it; gives back the folder that PEFT loads for comparison, None for itself.
        architecture: Of the tiny base that it is for.
        refused: What the error must name; empty if it is read.
        repair: What the error must advise.
        needs_base: Whether it is decided only with the base; without one it is refused so.
        note: What the report must say.
        late: Whether headers alone find no fault: tensors or the base do.
        arguments: Of `convert_adapter`, where plain conversion would refuse it.
    """

    name: str
    made_by: str
    build: Callable[[Path], Path | None]
    architecture: str = "llama"
    refused: str = ""
    repair: str = ""
    needs_base: bool = False
    note: str = ""
    late: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)


CASES: list[Case] = []


def case(name: str, made_by: str, **more: Any) -> Callable[[Callable[[Path], Any]], Any]:
    """Register a builder as a case."""

    def register(build: Callable[[Path], Any]) -> Any:
        CASES.append(Case(name, made_by, build, **more))
        return build

    return register


@contextlib.contextmanager
def quiet() -> Any:
    """PEFT warns of much that is meant here."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        yield


def wrap(config: Any, architecture: str = "llama", *, train: bool = True, **more: Any) -> Any:
    """A PEFT model on the tiny base, with random numbers in the factors."""
    with quiet():
        wrapped = get_peft_model(build_tiny_model(architecture), config, **more)
        generator = torch.Generator().manual_seed(5)
        if train:
            for name, parameter in wrapped.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    new = torch.randn(parameter.shape, generator=generator)
                    parameter.data = 0.2 * new.to(parameter.dtype)
    return wrapped


def save(wrapped: Any, folder: Path, **more: Any) -> None:
    """`save_pretrained`, without its README."""
    with quiet():
        wrapped.save_pretrained(folder, **more)


def make(
    folder: Path, architecture: str = "llama", targets: Any = ("q_proj", "v_proj"), **more: Any
) -> None:
    """A LoRA of PEFT's own."""
    targets = list(targets) if isinstance(targets, tuple) else targets
    options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **more}
    save(wrap(LoraConfig(target_modules=targets, **options), architecture), folder)


def edit(folder: Path, *, without: tuple[str, ...] = (), **changes: Any) -> None:
    """Change keys of the config."""
    config = json.loads((folder / CONFIG).read_text())
    config.update(changes)
    for key in without:
        config.pop(key, None)
    (folder / CONFIG).write_text(json.dumps(config))


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}


def rename(folder: Path, change: Callable[[str], str]) -> Path:
    """Other keys in a folder's file; the folder as it was beside it, for PEFT to load."""
    original = folder.with_name(f"{folder.name}-original")
    shutil.copytree(folder, original)
    save_file({change(key): t for key, t in read(folder).items()}, folder / WEIGHTS)
    return original


def base_weight(name: str, architecture: str = "llama") -> torch.Tensor:
    return build_tiny_model(architecture).get_parameter(name).detach().clone()


def add(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Further tensors in a folder's file; the folder without them beside it."""
    original = folder.with_name(f"{folder.name}-original")
    shutil.copytree(folder, original)
    save_file({**read(folder), **tensors}, folder / WEIGHTS)
    return original


# ---- PEFT itself


def plain(name: str, architecture: str = "llama", note: str = "", **options: Any) -> None:
    """A case of PEFT's own `save_pretrained`, which PEFT reads the same way."""

    def build(folder: Path) -> None:
        make(folder, architecture, **options)

    case(name, "PEFT", architecture=architecture, note=note)(build)


plain("plain")
plain("all linear layers", targets="all-linear")
plain("query_key_value", "gpt_neox", targets=("query_key_value",))
plain("Conv1D", "gpt2", targets=("c_attn", "c_fc"), fan_in_fan_out=True)
plain("Conv1D, flag wrong", "gpt2", targets=("c_attn", "c_fc"), fan_in_fan_out=False)
plain("Qwen3", "qwen3", targets="all-linear")
plain("Gemma 2", "gemma2", targets="all-linear")
plain("rsLoRA", use_rslora=True)
plain("ranks by name", rank_pattern={"q_proj": 2})
plain("ranks by pattern", rank_pattern={r".*\.layers\.1\..*(q_proj|up_proj)": 2})
plain("alphas by pattern", alpha_pattern={r"layers\.[01]\.self_attn\.v.*": 32, "v_proj": 5})
plain(
    "patterns of both, rsLoRA",
    use_rslora=True,
    rank_pattern={"[qk]_proj": 3},
    alpha_pattern={"^model.layers.0.self_attn.q_proj": 3, r"(?:attn|mlp)\.q_proj": 9},
)
plain("a pattern made to be slow", alpha_pattern={r"(x+x+)+y": 3, "(a|a)*b": 2})
plain("a dot that is any character", alpha_pattern={"q.proj": 3})
plain("some layers", layers_to_transform=[1], layers_pattern="layers")
plain("modules left out", targets="all-linear", exclude_modules=r".*\.layers\.0\..*")
plain("targets by pattern", targets=r".*\.self_attn\.(q|v)_proj")
plain("unsloth's pattern", targets=UNSLOTH)
plain("names of other models among targets", targets=("q_proj", "v_proj", "gate_up_proj"),
      note="no factors of the target modules gate_up_proj")  # fmt: skip
plain("gaussian initialisation", init_lora_weights="gaussian")
plain("orthogonal initialisation", init_lora_weights="orthogonal")
plain("biases asked for where there are none", bias="all")
plain("LoftQ's settings, not its initialisation", loftq_config={"loftq_bits": 4})
plain("dropout", lora_dropout=0.1)


@case("EVA, which leaves the base alone", "PEFT")
def _eva(folder: Path) -> Path:
    make(folder)
    original = folder.with_name("eva-original")
    shutil.copytree(folder, original)
    edit(folder, init_lora_weights="eva", eva_config={"rho": 1.0})
    return original


@case("modules_to_save that equal the base's", "axolotl", needs_base=True, note="left out")
def _axolotl(folder: Path) -> None:
    make(folder, modules_to_save=["embed_tokens", "lm_head"])


@case("embeddings saved along", "PEFT", needs_base=True, note="left out")
def _embeddings(folder: Path) -> Path:
    make(folder)
    original = folder.with_name("embeddings-original")
    shutil.copytree(folder, original)
    wrapped = wrap(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    save(wrapped, folder, save_embedding_layers=True)
    return original


@case("biases that were not trained", "PEFT", architecture="gpt_neox", needs_base=True)
def _biases(folder: Path) -> None:
    make(folder, "gpt_neox", targets=("query_key_value",), bias="all")


@case("token rows that were not trained", "PEFT", needs_base=True, note="left out")
def _token_rows(folder: Path) -> None:
    make(folder, trainable_token_indices=[3, 5])


@case("PiSSA, converted", "PEFT")
def _pissa_converted(folder: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="pissa")
    wrapped = wrap(config, train=False)
    start = folder.with_name("pissa-start")
    wrapped.peft_config["default"].init_lora_weights = True
    save(wrapped, start)
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05)
    save(wrapped, folder, path_initial_model_for_weight_conversion=str(start))


@case("keys of a newer version, switched off", "a newer PEFT")
def _newer(folder: Path) -> None:
    make(folder)
    edit(folder, use_next_thing=False, next_config=None, next_list=[], next_pattern={})


@case("keys of the first versions alone", "an early PEFT")
def _early(folder: Path) -> None:
    make(folder)
    (folder / CONFIG).write_text(json.dumps({
        "base_model_name_or_path": "decapoda-research/llama-7b-hf", "bias": "none",
        "enable_lora": None, "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 8,
        "lora_dropout": 0.05, "merge_weights": False, "modules_to_save": None, "peft_type": "LORA",
        "r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
    }))  # fmt: skip


# ---- other tools


@case("auto_mapping and its own pattern", "unsloth", note="a base in four bits")
def _unsloth(folder: Path) -> None:
    make(folder, targets=UNSLOTH)
    edit(folder, base_model_name_or_path="unsloth/tinyllama-bnb-4bit",
         auto_mapping={"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True})  # fmt: skip


@case("a folder full of other files", "LLaMA-Factory")
def _llama_factory(folder: Path) -> None:
    make(folder, targets=("q_proj", "v_proj", "up_proj"))
    for name in ("trainer_log.jsonl", "all_results.json", "README.md", "training_args.bin"):
        (folder / name).write_text("{}")
    build_tiny_tokenizer().save_pretrained(folder)
    edit(folder, base_model_name_or_path="/u01/app/mlo/models/Llama")


@case("five keys of a config", "torchtune")
def _torchtune(folder: Path) -> None:
    make(folder)
    (folder / CONFIG).write_text(json.dumps({
        "r": 4, "lora_alpha": 8.0, "target_modules": ["q_proj", "v_proj"], "peft_type": "LORA",
        "base_model_name_or_path": "meta-llama/Llama-3.2-1B",
    }))  # fmt: skip


@case("a checkpoint's folder", "transformers Trainer")
def _trainer(folder: Path) -> None:
    make(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": []}))
    (folder / "optimizer.pt").write_bytes(b"\x80\x02")


@case("the base's own weights in the file", "DeepSpeed", needs_base=True, note="left out")
def _deepspeed(folder: Path) -> Path:
    make(folder)
    name = "model.layers.0.self_attn.q_proj"
    (folder / "zero_to_fp32.py").write_text("")
    return add(folder, {f"{PREFIX}{name}.base_layer.weight": base_weight(f"{name}.weight")})


@case("half precision", "TRL")
def _half(folder: Path) -> None:
    make(folder)
    save_file({k: t.half() for k, t in read(folder).items()}, folder / WEIGHTS)


@case("bfloat16", "TRL")
def _bfloat16(folder: Path) -> None:
    make(folder)
    save_file({k: t.bfloat16() for k, t in read(folder).items()}, folder / WEIGHTS)


@case("other metadata", "a signing tool")
def _metadata(folder: Path) -> None:
    make(folder)
    save_file(read(folder), folder / WEIGHTS, metadata={"c2pa": "x" * 500})


def renamed(name: str, made_by: str, change: Callable[[str], str], note: str = "") -> None:
    """A case with other keys: PEFT's own folder is what it must equal."""

    def build(folder: Path) -> Path:
        make(folder, targets=("q_proj", "v_proj", "up_proj"), alpha_pattern={"v_proj": 3})
        return rename(folder, change)

    case(name, made_by, note=note)(build)


def infix(segment: str, after: str) -> Callable[[str], str]:
    return lambda key: key.replace(after, f"{after}{segment}.")


def swap(before: str, after: str) -> Callable[[str], str]:
    return lambda key: key.replace(before, after, 1)


renamed(
    "adapter name in the keys", "PEFT's state_dict", swap(".weight", ".default.weight"), "'default'"
)
renamed("another adapter name", "PEFT's state_dict", swap(".weight", ".sft-v2.weight"), "'sft-v2'")
renamed("adapter name twice", "PEFT, wrapped twice", swap(".weight", ".default.default.weight"))
renamed("prefix twice", "PEFT, wrapped twice", lambda key: PREFIX + key, "twice")
renamed("no prefix", "a hand-written loop", lambda key: key.removeprefix(PREFIX), "missing")
renamed(
    "model compiled",
    "torch.compile",
    swap(f"{PREFIX}model.", f"{PREFIX}_orig_mod.model."),
    "_orig_mod",
)
renamed("model compiled outside", "torch.compile", lambda key: f"_orig_mod.{key}")
renamed("distributed", "DistributedDataParallel", lambda key: f"module.{key}", "'module'")
renamed(
    "FSDP, blocks wrapped",
    "FSDP",
    lambda key: key.replace("layers.0.", "layers.0._fsdp_wrapped_module.").replace(
        "layers.1.", "layers.1._fsdp_wrapped_module."
    ),
)
renamed(
    "FSDP, all wrapped",
    "FSDP",
    lambda key: f"_fsdp_wrapped_module.{key}".replace(
        ".self_attn.", "._fsdp_wrapped_module.self_attn."
    ),
)
renamed(
    "checkpointed activations",
    "FSDP",
    lambda key: key.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn.").replace(
        ".mlp.", "._checkpoint_wrapped_module.mlp."
    ),
)
renamed("wrapped twice, inner layer", "PEFT, wrapped twice", swap(".lora_", ".base_layer.lora_"))
renamed("factors that are parameters", "loralib", lambda key: key.removesuffix(".weight"))


def renamed_for_base(name: str, made_by: str, change: Callable[[str], str]) -> None:
    """The same, where only the base says how the names are meant."""

    def build(folder: Path) -> Path:
        make(folder, targets=("q_proj", "v_proj", "up_proj"))
        return rename(folder, change)

    case(name, made_by, note="prefix" if "prefix" in name else "")(build)


renamed_for_base(
    "prefix of a vision model",
    "transformers",
    swap(f"{PREFIX}model.", f"{PREFIX}model.language_model."),
)
renamed_for_base(
    "prefix of an older vision model",
    "transformers 4",
    swap(f"{PREFIX}model.", f"{PREFIX}language_model.model."),
)
renamed_for_base(
    "prefix of a policy",
    "a trainer for reinforcement learning",
    swap(f"{PREFIX}model.", f"{PREFIX}actor.policy.model."),
)
renamed_for_base(
    "prefix of a bare model", "PEFT on AutoModel", swap("model.model.layers", "model.layers")
)
renamed_for_base(
    "blocks in an unknown shell",
    "a pipeline library",
    lambda key: key.replace("layers.0.", "layers.0.shell.").replace("layers.1.", "layers.1.shell."),
)


@case("layers in an unknown shell", "transformers")
def _shell(folder: Path) -> Path:
    make(folder)
    original = rename(folder, swap(".lora_", ".linear.lora_"))
    edit(folder, target_modules=["linear"])
    return original


@case("full names of a vision model as targets", "PEFT")
def _full_targets(folder: Path) -> Path:
    make(folder, targets="all-linear")
    names = json.loads((folder / CONFIG).read_text())["target_modules"]
    original = rename(folder, swap(f"{PREFIX}model.", f"{PREFIX}model.language_model."))
    edit(folder, target_modules=[n.replace("model.", "model.language_model.", 1) for n in names])
    return original


@case("shards with an index", "unsloth", note="shards")
def _shards(folder: Path) -> Path:
    make(folder, targets="all-linear")
    original = folder.with_name("shards-original")
    shutil.copytree(folder, original)
    _split(folder)
    return original


def _split(folder: Path) -> None:
    tensors = read(folder)
    keys = sorted(tensors)
    index = {}
    for number in (1, 2):
        name = f"adapter_model-0000{number}-of-00002.safetensors"
        part = {key: tensors[key] for key in keys[number - 1 :: 2]}
        save_file(part, folder / name)
        index |= dict.fromkeys(part, name)
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@case("a vocabulary cut shorter", "axolotl", needs_base=True, note="left out")
def _shorter(folder: Path) -> Path:
    make(folder)
    return add(folder, {f"{PREFIX}lm_head.weight": base_weight("lm_head.weight")[:250]})


@case("a base in four bits", "QLoRA", note="a base in four bits")
def _quantised_base(folder: Path) -> None:
    make(folder)
    edit(folder, base_model_name_or_path="TheBloke/Llama-2-7B-GPTQ", revision="main")


# ---- refused


def refused(
    name: str, made_by: str, cause: str, repair: str, *, late: bool = False, **more: Any
) -> Callable[[Callable[[Path], Any]], Any]:
    return case(name, made_by, refused=cause, repair=repair, late=late, **more)


@refused("DoRA", "PEFT", "use_dora", "molora adapter convert FOLDER OUT --base BASE --kind svd")
def _dora(folder: Path) -> None:
    make(folder, use_dora=True)


def _other_start(start: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        make(folder)
        edit(folder, init_lora_weights=start)

    return build


for _start in ("pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga", "a_newer_one"):
    refused(
        f"{_start}, not converted", "PEFT", f"init_lora_weights '{_start}'",
        "path_initial_model_for_weight_conversion",
    )(_other_start(_start))  # fmt: skip


@refused("PiSSA by PEFT, not converted", "PEFT", "'pissa'", "model.save_pretrained(OUT")
def _pissa(folder: Path) -> None:
    make(folder, init_lora_weights="pissa")


@refused("tensors of shape (0,)", "DeepSpeed ZeRO-3", "ZeRO-3 without gathering", "zero_to_fp32.py")
def _zero3(folder: Path) -> None:
    make(folder)
    save_file({key: torch.zeros(0) for key in read(folder)}, folder / WEIGHTS)


@refused("a file of 40 bytes", "DeepSpeed ZeRO-3", "ZeRO-3 without gathering", "zero_to_fp32.py")
def _forty_bytes(folder: Path) -> None:
    make(folder)
    save_file({}, folder / WEIGHTS)


@refused("one process's slice", "FSDP2", "one of 2 processes", "FULL_STATE_DICT")
def _slice(folder: Path) -> None:
    make(folder)
    sliced = {key: t[: len(t) // 2].contiguous() for key, t in read(folder).items()}
    save_file(sliced, folder / WEIGHTS)


@refused("flat parameters", "FSDP", "flattened by FSDP", "FULL_STATE_DICT")
def _flat(folder: Path) -> None:
    make(folder)
    save_file({key: t.flatten() for key, t in read(folder).items()}, folder / WEIGHTS)


@refused("a pickle", "an early PEFT", "a pickle", "weights_only=True")
def _pickle(folder: Path) -> None:
    make(folder)
    torch.save(read(folder), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


@refused("MLX's folder", "MLX", "MLX", "mlx_lm.fuse")
def _mlx(folder: Path) -> None:
    make(folder)
    tensors = {
        key.removeprefix(PREFIX).removesuffix(".weight").replace("lora_A", "lora_a")
        .replace("lora_B", "lora_b"): t.T.contiguous()
        for key, t in read(folder).items()
    }  # fmt: skip
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / "adapters.safetensors")
    (folder / CONFIG).write_text(json.dumps({
        "fine_tune_type": "lora", "model": "mlx-community/Llama-3.2-1B-4bit", "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0},
    }))  # fmt: skip


@refused("MLX's keys under PEFT's names", "MLX", "the other way round", "mlx_lm.fuse")
def _mlx_keys(folder: Path) -> None:
    _mlx(folder)
    (folder / "adapters.safetensors").rename(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 80,
                                             "target_modules": ["q_proj", "v_proj"]}))  # fmt: skip


@refused("factors lie the other way round", "an MLX converter", "the other way round", "again")
def _transposed(folder: Path) -> None:
    make(folder)
    save_file({key: t.T.contiguous() for key, t in read(folder).items()}, folder / WEIGHTS)


@refused("torchtune's own names", "torchtune", "torchtune", "FullModelHFCheckpointer")
def _torchtune_names(folder: Path) -> None:
    make(folder)
    tensors = {
        key.removeprefix(f"{PREFIX}model.").replace("self_attn", "attn").replace("lora_A", "lora_a")
        .replace("lora_B", "lora_b"): t for key, t in read(folder).items()
    }  # fmt: skip
    save_file(tensors, folder / WEIGHTS)


_TARGETS = {"target_modules": ["q_proj", "v_proj"]}
for _kind, _config in {
    "ADALORA": lambda: AdaLoraConfig(total_step=10, init_r=4, target_r=2, **_TARGETS),
    "IA3": lambda: IA3Config(feedforward_modules=["v_proj"], **_TARGETS),
    "LOHA": lambda: LoHaConfig(r=4, **_TARGETS),
    "LOKR": lambda: LoKrConfig(r=4, **_TARGETS),
    "OFT": lambda: OFTConfig(oft_block_size=4, **_TARGETS),
    "VERA": lambda: VeraConfig(r=4, target_modules=["q_proj"]),
    "PROMPT_TUNING": lambda: PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": lambda: PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}.items():

    def _other_kind(folder: Path, config: Any = _config) -> None:
        save(wrap(config(), train=False), folder)

    refused(
        f"{_kind}, no LoRA", "PEFT", f"peft_type '{_kind}'",
        "Train it again as a LoRA" if "TUNING" in _kind else "merge_and_unload()",
    )(_other_kind)  # fmt: skip


@refused("activated LoRA", "PEFT", "alora_invocation_tokens", "without alora_invocation_tokens")
def _alora(folder: Path) -> None:
    make(folder, alora_invocation_tokens=[1, 2])


@refused("a classifier", "PEFT", "classification head", "task_type CAUSAL_LM")
def _classifier(folder: Path) -> None:
    make(folder)
    edit(folder, task_type="SEQ_CLS")


@refused("a classifier's head in the file", "PEFT", "the head of a classifier", "CAUSAL_LM")
def _score(folder: Path) -> None:
    make(folder)
    add(folder, {f"{PREFIX}score.weight": torch.ones(2, 32)})


@refused("a value head in the file", "TRL", "value model", "CAUSAL_LM")
def _value_head(folder: Path) -> None:
    make(folder)
    add(folder, {"v_head.summary.weight": torch.ones(1, 32)})


@refused("fused expert weights", "PEFT", "target_parameters", "name linear layers")
def _fused(folder: Path) -> None:
    make(folder)
    edit(folder, target_parameters=["mlp.experts.gate_up_proj"])


@refused("factors of three dimensions", "PEFT", "fused expert weights", "name linear layers")
def _three(folder: Path) -> None:
    make(folder)
    save_file({k: t[None].repeat(2, 1, 1) for k, t in read(folder).items()}, folder / WEIGHTS)


@refused("repeated layers", "PEFT", "layer_replication", "without it")
def _replication(folder: Path) -> None:
    make(folder)
    edit(folder, layer_replication=[[0, 2], [1, 2]])


@refused("new token rows", "PEFT", "trainable_token_indices", "--drop-saved", needs_base=True)
def _new_rows(folder: Path) -> None:
    make(folder, trainable_token_indices=[3, 5])
    key = next(key for key in read(folder) if "trainable_tokens" in key)
    save_file({**read(folder), key: read(folder)[key] + 1}, folder / WEIGHTS)


@refused(
    "embeddings trained", "axolotl", "1 changed rows, 'e' (68)", "--drop-saved", needs_base=True
)
def _trained_embeddings(folder: Path) -> None:
    make(folder, modules_to_save=["embed_tokens"])
    key = next(key for key in read(folder) if "embed_tokens" in key)
    changed = read(folder)[key]
    changed[68, 3] += 1e-3
    save_file({**read(folder), key: changed}, folder / WEIGHTS)


@refused(
    "tokens added", "TRL", "2 added rows, '<|im_start|>' (257)", "--drop-saved", needs_base=True
)
def _added_tokens(folder: Path) -> None:
    make(folder)
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    more = torch.cat([base_weight("lm_head.weight"), torch.ones(2, 32)])
    add(folder, {f"{PREFIX}lm_head.weight": more})


@refused("a norm trained", "PEFT", "other numbers", "--drop-saved", needs_base=True)
def _norm(folder: Path) -> None:
    make(folder)
    add(folder, {f"{PREFIX}model.norm.weight": base_weight("model.norm.weight") * 1.01})


@refused("biases trained", "PEFT", "saved by bias", "--drop-saved", architecture="gpt_neox",
         needs_base=True)  # fmt: skip
def _trained_biases(folder: Path) -> None:
    make(folder, "gpt_neox", targets=("query_key_value",), bias="all")
    save_file({k: t + 0.1 if k.endswith(".bias") else t for k, t in read(folder).items()},
              folder / WEIGHTS)  # fmt: skip


@refused("LoRA on the head", "mergekit", "lm_head", "without lm_head", late=True)
def _head(folder: Path) -> None:
    make(folder, targets=("q_proj", "lm_head"))
    tensors = {k: t for k, t in read(folder).items() if "lora_" in k}
    save_file(tensors, folder / WEIGHTS)


@refused("LoRA on the embedding", "PEFT", "the embedding is changed", "without the embedding")
def _embedding(folder: Path) -> None:
    make(folder, targets=("q_proj", "embed_tokens"))


@refused("the adapter in a subfolder", "TRL", "train/adapter, train/reference", "Name one")
def _subfolders(folder: Path) -> None:
    make(folder / "train" / "adapter")
    make(folder / "train" / "reference")
    for name in ("README.md", CONFIG, WEIGHTS):
        (folder / "train" / name).unlink(missing_ok=True)


@refused("a whole checkpoint", "transformers", "a whole checkpoint", "--checkpoint")
def _checkpoint(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")


@refused("biases on lora_B", "PEFT", "lora_bias", "merge_and_unload()", architecture="gpt_neox")
def _lora_bias(folder: Path) -> None:
    make(folder, "gpt_neox", targets=("query_key_value",), lora_bias=True)


@refused("integers of eight bits", "bitsandbytes", "I8", "Convert them", late=True)
def _int8(folder: Path) -> None:
    make(folder)
    save_file({key: t.to(torch.int8) for key, t in read(folder).items()}, folder / WEIGHTS)


@refused(
    "lora_B all zero", "a crashed run", "changes 0 of 4 modules", "save the trained", late=True
)
def _zero(folder: Path) -> None:
    make(folder)
    save_file({k: t * 0 if "lora_B" in k else t for k, t in read(folder).items()}, folder / WEIGHTS)


@refused("NaN", "training in float16", "expected finite numbers", "again", late=True)
def _nan(folder: Path) -> None:
    make(folder)
    save_file({k: t * float("nan") for k, t in read(folder).items()}, folder / WEIGHTS)


@refused("a pattern with look-ahead", "by hand", "linear time", "Write the modules' names out")
def _lookahead(folder: Path) -> None:
    make(folder, alpha_pattern={r"(?!.*v_proj).*q_proj": 3})


@refused("a pattern that refers back", "by hand", "linear time", "Write the modules' names out")
def _back_reference(folder: Path) -> None:
    make(folder)
    edit(folder, alpha_pattern={r"(q)\1_proj": 3})


@refused("a missing shard", "unsloth", "no 'adapter_model-00002", "Copy the whole folder")
def _missing_shard(folder: Path) -> None:
    make(folder)
    _split(folder)
    (folder / "adapter_model-00002-of-00002.safetensors").unlink()


@refused("shards without an index", "unsloth", "2 shards without it", "Copy the whole folder")
def _no_index(folder: Path) -> None:
    make(folder)
    _split(folder)
    (folder / f"{WEIGHTS}.index.json").unlink()


@refused("a shard outside the folder", "an attacker", "the name '../", "Copy the whole folder")
def _outside(folder: Path) -> None:
    make(folder)
    _split(folder)
    path = folder / f"{WEIGHTS}.index.json"
    path.write_text(path.read_text().replace("adapter_model-00002", "../x/adapter_model-00002"))


@refused("a shard that is a link", "an attacker", "a link", "Copy the whole folder")
def _link(folder: Path) -> None:
    make(folder)
    _split(folder)
    shard = folder / "adapter_model-00002-of-00002.safetensors"
    shard.rename(folder.with_name("elsewhere.safetensors"))
    shard.symlink_to(folder.with_name("elsewhere.safetensors"))


@refused("the vision tower trained, too", "unsloth", "vision_tower", "finetune_vision_layers=False",
         late=True)  # fmt: skip
def _vision(folder: Path) -> None:
    make(folder)
    tower = {
        key.replace(f"{PREFIX}model.", f"{PREFIX}model.vision_tower.encoder.", 1): t
        for key, t in read(folder).items()
    }
    language = {
        key.replace(f"{PREFIX}model.", f"{PREFIX}model.language_model.", 1): t
        for key, t in read(folder).items()
    }
    save_file({**tower, **language}, folder / WEIGHTS)


@refused("the vision tower alone", "unsloth", "vision_tower", "finetune_vision_layers=False",
         late=True)  # fmt: skip
def _vision_alone(folder: Path) -> None:
    make(folder)
    rename(folder, swap(f"{PREFIX}model.", f"{PREFIX}model.vision_tower.encoder."))


@refused("two adapters in one file", "PEFT's state_dict", "keys of 2", "selected_adapters")
def _two(folder: Path) -> None:
    make(folder)
    names = {n: {k.replace(".weight", f".{n}.weight"): t for k, t in read(folder).items()}
             for n in ("sft", "dpo")}  # fmt: skip
    save_file({**names["sft"], **names["dpo"]}, folder / WEIGHTS)


@refused("the same layer twice", "by hand", "both of", "once")
def _twice(folder: Path) -> None:
    make(folder)
    more = {f"_orig_mod.{key}": t.clone() for key, t in read(folder).items()}
    save_file({**read(folder), **more}, folder / WEIGHTS)


@refused("another architecture", "PEFT", "another architecture", "train it on this base", late=True)
def _architecture(folder: Path) -> None:
    make(folder, "gpt_neox", targets=("query_key_value",))


@refused("a deeper model", "PEFT", "in 2 blocks", "train it on this base", late=True)
def _deeper(folder: Path) -> None:
    make(folder)
    rename(folder, swap("layers.1.", "layers.7."))


@refused("a shared expert of another model", "PEFT", "another architecture", "train it", late=True)
def _shared_expert(folder: Path) -> None:
    make(folder, targets=("up_proj",))
    rename(folder, swap(".mlp.", ".mlp.shared_expert."))


@refused("experts one by one", "transformers 4", "fuses experts", "dense layers", late=True)
def _experts(folder: Path) -> None:
    make(folder, targets=("up_proj",))
    rename(folder, swap(".mlp.", ".mlp.experts.3."))


@refused("a link into the Hub's cache", "huggingface_hub", "leads out of the folder", "cp -rL")
def _hub_cache(folder: Path) -> None:
    make(folder)
    (folder / WEIGHTS).rename(folder.with_name("blob"))
    (folder / WEIGHTS).symlink_to(folder.with_name("blob"))


@refused("a wider model", "PEFT", "expected a change of shape", "training on this base", late=True)
def _wider(folder: Path) -> None:
    make(folder)
    save_file({k: torch.cat([t, t], 1 if "lora_A" in k else 0) for k, t in read(folder).items()},
              folder / WEIGHTS)  # fmt: skip


@refused("one factor missing", "PEFT", "missing tensor", "again")
def _one_factor(folder: Path) -> None:
    make(folder)
    tensors = read(folder)
    tensors.pop(next(key for key in sorted(tensors) if "lora_B" in key))
    save_file(tensors, folder / WEIGHTS)


@refused("ranks that are not the config's", "by hand", "instead of 8", "again")
def _other_rank(folder: Path) -> None:
    make(folder, r=3)
    edit(folder, r=8)


@refused("factors of blocks that the config leaves out", "by hand", "leave out", "target_modules")
def _other_blocks(folder: Path) -> None:
    make(folder)
    edit(folder, layers_to_transform=[1])


@refused("factors of modules that the config leaves out", "by hand", "leave out", "target_modules")
def _other_modules(folder: Path) -> None:
    make(folder)
    edit(folder, target_modules=["q_proj"])


@refused("factors that a pattern leaves out", "by hand", "leave out", "target_modules")
def _other_pattern(folder: Path) -> None:
    make(folder)
    edit(folder, target_modules=r".*\.q_proj")


@refused("factors of excluded modules", "by hand", "leave out", "target_modules")
def _excluded(folder: Path) -> None:
    make(folder)
    edit(folder, exclude_modules=["q_proj"])


@refused("a feature of tomorrow, switched on", "a newer PEFT", "use_tomorrow", "without these")
def _tomorrow(folder: Path) -> None:
    make(folder)
    edit(folder, use_tomorrow=True)


@cache
def tiny_base(architecture: str) -> Any:
    """The tiny base, not to be changed."""
    return build_tiny_model(architecture)


def peft_logits(architecture: str, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """What plain PEFT computes with a folder."""
    with quiet(), torch.no_grad():
        return (
            PeftModel.from_pretrained(build_tiny_model(architecture), folder).eval()(tokens).logits
        )


def train_with_peft(folder: Path, model: Any, blocks: torch.Tensor, steps: int = 30) -> None:
    """A LoRA trained by PEFT on a model, as another program would."""
    with quiet():
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        wrapped = get_peft_model(model, config)
        optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], 1e-2)
        for step in range(steps):
            batch = blocks[(step * 8) % (len(blocks) - 8) :][:8]
            wrapped(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        wrapped.save_pretrained(folder)


def has_only_factors(folder: Path) -> bool:
    """Whether a weights file holds nothing but pairs in PEFT's form."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return all(key.startswith(PREFIX) and ".lora_" in key for key in file.keys())  # noqa: SIM118


TOLERANCE = 1e-5
"""Of logits (float32, size about 3): PEFT adds `B(A(x))` to a layer's output, we add `B @ A`."""
DORA_TOLERANCE = 1e-4
