"""A LoRA's folder as some tool left it: where its tensors lie, and what it says of its origin.

Nothing that a folder names is ever opened outside of it, loaded or run.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from molora_fed.adapters.headers import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    TensorHeader,
    describe_unreadable,
    load_json,
    read_headers,
)
from molora_fed.adapters.peft_config import LoraSettings, read_settings
from molora_fed.adapters.peft_keys import KeptTensor
from molora_fed.adapters.peft_tensors import BaseLayers, LoraLayout, resolve_layout
from molora_fed.storage.files import is_file
from molora_fed.storage.untrusted import clean

__all__ = [
    "Claims",
    "LoraFolder",
    "check_has_adapter",
    "check_plain",
    "describe_base",
    "describe_cause",
    "find_adapters",
    "find_weight_files",
    "open_lora_folder",
    "read_claims",
]

MAX_SHARDS = 1_000
_MOST_ENTRIES = 1_000  # of one folder that are looked at
_MOST_FOLDERS = 100  # whose folders are looked into
_MOST_FOUND = 20  # adapters in subfolders that are listed
_SHARD = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,150}\.safetensors")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_FOUR_BITS = re.compile(r"4[-_]?bit|bnb|gptq|awq|nf4|int4", re.IGNORECASE)
SAFE_CONVERSION = (
    'python -c "import torch; from safetensors.torch import save_file; '
    "save_file({k: v.contiguous().clone() for k, v in torch.load('adapter_model.bin', "
    "weights_only=True).items()}, 'adapter_model.safetensors')\""
)


@dataclass(frozen=True)
class Claims:
    """What a folder says of where it comes from; nobody has checked it.

    Attributes:
        base: Name of the base it was trained on; of a local folder the last part alone; "" if it
            does not say.
        revision: Revision of that base, or "".
        peft_version: Version of PEFT that saved it, or "".
        tool: Program that trained it, as far as files and keys tell, or "".
    """

    base: str = ""
    revision: str = ""
    peft_version: str = ""
    tool: str = ""

    @property
    def has_quantised_base(self) -> bool:
        """Whether the base's name is that of a copy in four bits."""
        return bool(_FOUR_BITS.search(self.base))


@dataclass(frozen=True)
class LoraFolder:
    """A LoRA's folder of which config and headers were read, and no tensor.

    Attributes:
        config: Content of `adapter_config.json`.
        settings: What it says about scales and names.
        layout: Which tensor is what.
        paths: Its weights file, or the shards.
        num_bytes: Bytes of these together.
    """

    config: Mapping[str, Any]
    settings: LoraSettings
    layout: LoraLayout
    paths: tuple[Path, ...]
    num_bytes: int


def open_lora_folder(
    folder: Path,
    name: str,
    *,
    base: BaseLayers | None = None,
    max_rank: int | None = None,
    headers: Mapping[str, TensorHeader] | None = None,
    max_bytes: int | None = None,
) -> LoraFolder:
    """Read config and headers of a LoRA's folder from anywhere.

    Args:
        folder: The folder.
        name: The adapter's name, for errors.
        base: The base's layers, see `resolve_layout`.
        max_rank: Largest rank, if a charter limits it.
        headers: The tensors' headers, if they were read.
        max_bytes: Largest weights file.

    Raises:
        AdapterError: If PEFT would make something else of it than a low-rank change of linear
            layers; in one line, with what repairs it.
    """
    check_has_adapter(folder, name)
    config = load_json(folder / CONFIG_FILE, name)
    settings = read_settings(config, name)
    paths = find_weight_files(folder, name)
    if headers is None:
        headers = read_headers(paths, name, max_bytes=max_bytes)
    layout = resolve_layout(headers, settings, name, base=base, max_rank=max_rank)
    size = sum(path.stat().st_size for path in paths)
    return LoraFolder(config, settings, layout, paths, size)


def check_plain(
    source: LoraFolder, name: str, *, has_base: bool, with_magnitudes: bool = False
) -> None:
    """Refuse what headers tell to be more than a low-rank change.

    Args:
        source: Config and headers.
        name: The adapter's name, for errors.
        has_base: Whether whole weights can be compared with a base's.
        with_magnitudes: Whether DoRA is read, for who makes something else of it.

    Raises:
        AdapterError: If magnitudes are trained (DoRA), or whole weights cannot be compared.
    """
    settings, layout = source.settings, source.layout
    if not with_magnitudes and (
        settings.uses_dora or any(p.magnitude for p in layout.pairs.values())
    ):
        raise describe_unreadable(
            name,
            expected="a plain LoRA, which adds scale * B @ A and nothing else",
            got="use_dora: a magnitude beside the product",
            fix="Make its exact difference to the base an adapter of kind svd with `molora adapter "
            "convert FOLDER OUT --base BASE --kind svd`, which says what that loses.",
        )
    if layout.kept and not has_base:
        raise describe_unreadable(
            name,
            expected="factors alone, or a base to compare the other tensors with",
            got=_describe_kept(layout.kept, layout.headers, settings),
            fix="Compare them with `molora adapter check FOLDER --base BASE`: what equals the "
            "base's is left out.",
        )


def _describe_kept(
    kept: Sequence[KeptTensor], headers: Mapping[str, TensorHeader], settings: LoraSettings
) -> str:
    """Name whole weights and what saved them, for errors: keys and shapes."""
    shown = [f"extra tensor '{each.key}' of shape {headers[each.key].shape}" for each in kept[:3]]
    more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
    return ", ".join(shown) + more + f" ({describe_cause(kept, settings)})"


def describe_cause(kept: Sequence[KeptTensor], settings: LoraSettings) -> str:
    """What saved whole weights along, as far as the config and the tensors tell."""
    if any(each.is_rows for each in kept):
        return "saved by trainable_token_indices"
    if settings.saved_modules:
        return f"saved by modules_to_save {', '.join(settings.saved_modules[:5])}"
    if any(each.path.endswith(".bias") for each in kept):
        return "saved by bias"
    return "saved by save_embedding_layers, as after resize_token_embeddings"


def find_adapters(folder: Path) -> list[str]:
    """Subfolders, up to two levels down, that hold an adapter; links are not followed."""
    found: list[str] = []
    level = [folder]
    for _ in range(2):
        below = []
        for each in level:
            try:
                with os.scandir(each) as entries:
                    inner = [
                        Path(entry.path)
                        for entry in islice(entries, _MOST_ENTRIES)
                        if entry.is_dir(follow_symlinks=False)
                    ]
            except OSError:
                continue
            below += inner
        found += [str(b.relative_to(folder)) for b in below if is_file(b / CONFIG_FILE)]
        level = below[:_MOST_FOLDERS]
    return sorted(found)


def check_has_adapter(folder: Path, name: str) -> None:
    """Refuse a folder that has no adapter itself, and say where there are some.

    Raises:
        AdapterError: If there is no `adapter_config.json`.
    """
    if os.path.exists(folder / CONFIG_FILE) or (folder / CONFIG_FILE).is_symlink():
        return
    inner = [clean(each, 80) for each in find_adapters(folder)]
    if inner:
        more = f" and {len(inner) - _MOST_FOUND} more" if len(inner) > _MOST_FOUND else ""
        raise describe_unreadable(
            name,
            expected=f"a file '{CONFIG_FILE}'",
            got=f"none here, but in the folders {', '.join(inner[:_MOST_FOUND])}{more}",
            fix="Name one of these folders.",
        )
    if is_file(folder / "config.json"):
        raise describe_unreadable(
            name,
            expected=f"a file '{CONFIG_FILE}'",
            got="a whole checkpoint with config.json",
            fix="Pass it to `molora contribute --checkpoint`.",
        )
    raise describe_unreadable(
        name,
        expected=f"a file '{CONFIG_FILE}'",
        got="No such file or directory",
        fix="Check the folder's name, or export the adapter again.",
    )


def find_weight_files(folder: Path, name: str) -> tuple[Path, ...]:
    """The file that holds an adapter's tensors, or the shards that its index names.

    Raises:
        AdapterError: If there is none, or a shard is missing, a link or outside the folder; says
            what is there instead, and what makes it readable.
    """
    path = folder / WEIGHTS_FILE
    if os.path.exists(path) or path.is_symlink():
        return (path,)
    if os.path.exists(folder / INDEX_FILE):
        return _list_shards(folder, name)
    names = _list_names(folder)
    shards = [n for n in names if n.startswith("adapter_model-") and n.endswith(".safetensors")]
    expected = f"a file '{WEIGHTS_FILE}'"
    if shards:
        raise describe_unreadable(
            name,
            expected=f"the index '{INDEX_FILE}' of its shards",
            got=f"{len(shards)} shards without it, e.g. '{shards[0]}'",
            fix="Copy the whole folder, or save the adapter again in one file.",
        )
    if "adapter_model.bin" in names or "pytorch_model.bin" in names:
        raise describe_unreadable(
            name,
            expected=expected,
            got="'adapter_model.bin', a pickle, which could run code when it is read",
            fix=f"Convert it in its folder: {SAFE_CONVERSION}",
        )
    if "adapters.safetensors" in names:
        raise describe_unreadable(
            name,
            expected=expected,
            got="'adapters.safetensors', of MLX, whose factors lie the other way round",
            fix="Merge it with `mlx_lm.fuse --model BASE --adapter-path FOLDER --save-path OUT`, "
            "and pass OUT to `molora contribute --checkpoint`.",
        )
    inner = find_adapters(folder)
    if inner:
        raise describe_unreadable(
            name,
            expected=expected,
            got=f"none here, but adapters in the folders {', '.join(inner[:_MOST_FOUND])}",
            fix="Name one of these folders.",
        )
    raise describe_unreadable(
        name,
        expected=expected,
        got="No such file or directory",
        fix="Check the folder's name, or export the adapter again.",
    )


def _list_names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in islice(entries, _MOST_ENTRIES))
    except OSError:
        return []


def _list_shards(folder: Path, name: str) -> tuple[Path, ...]:
    """The files that an index names, each a plain file beside it."""
    fix = "Copy the whole folder, or save the adapter again in one file."
    listed = load_json(folder / INDEX_FILE, name).get("weight_map")
    files = set(listed.values()) if isinstance(listed, dict) and _are_texts(listed) else set()
    if not files or len(files) > MAX_SHARDS:
        raise describe_unreadable(
            name,
            expected=f"a weight_map with 1 to {MAX_SHARDS} files in '{INDEX_FILE}'",
            got=f"{len(files)}",
            fix=fix,
        )
    strange = sorted(each for each in files if not _SHARD.fullmatch(each))
    wrong = [f"the name '{clean(each, 80)}'" for each in strange]
    for each in sorted(files - set(strange)):
        if (folder / each).is_symlink():
            wrong.append(f"'{each}', a link")
        elif not is_file(folder / each):
            wrong.append(f"no '{each}'")
    if wrong:
        raise describe_unreadable(
            name,
            expected=f"the shards that '{INDEX_FILE}' names as plain files beside it",
            got=", ".join(wrong[:5]),
            fix=fix,
        )
    return tuple(folder / each for each in sorted(files))


def _are_texts(values: Mapping[str, Any]) -> bool:
    return all(isinstance(value, str) for value in values.values())


def read_claims(folder: Path, name: str) -> Claims:
    """What a folder says of its base and of the programs that made it, cleaned and short.

    Raises:
        AdapterError: If its config cannot be read.
    """
    config = load_json(folder / CONFIG_FILE, name)
    given = config.get("base_model_name_or_path") or config.get("model") or ""
    return Claims(
        base=describe_base(given),
        revision=_text(config.get("revision"), 64),
        peft_version=_text(config.get("peft_version"), 32),
        tool=_guess_tool(config, _list_names(folder)),
    )


def describe_base(given: Any) -> str:
    """A base's name as it may be published: a path on somebody's machine loses all but its end."""
    text = _text(given, 1_000)
    if _HUB_NAME.fullmatch(text) and len(text) <= 120:
        return text
    last = [part for part in re.split(r"[\\/]", text) if part not in ("", ".", "..", "~")]
    return clean(f"…/{last[-1]}", 120) if last else ""


def _text(value: Any, limit: int) -> str:
    return clean(value, limit) if isinstance(value, str) else ""


def _guess_tool(config: Mapping[str, Any], names: list[str]) -> str:
    """Program that made a folder, by keys and names of files that only it writes."""
    mapping = config.get("auto_mapping")
    base = str(config.get("base_model_name_or_path") or "")
    if (isinstance(mapping, dict) and mapping.get("unsloth_fixed")) or base.startswith("unsloth/"):
        return "unsloth"
    if "fine_tune_type" in config or "lora_parameters" in config:
        return "MLX"
    if {"trainer_log.jsonl", "training_args.yaml", "llamaboard_config.yaml"} & set(names):
        return "LLaMA-Factory"
    if any("axolotl" in each for each in names):
        return "axolotl"
    if "torchtune_config.yaml" in names or {"r", "lora_alpha", "target_modules", "peft_type"} == (
        config.keys() - {"base_model_name_or_path"}
    ):
        return "torchtune"
    if any(each.startswith("global_step") for each in names) or "zero_to_fp32.py" in names:
        return "DeepSpeed"
    if "mergekit_config.yml" in names:
        return "mergekit"
    if "training_args.bin" in names or "trainer_state.json" in names:
        return "transformers Trainer"
    return "PEFT" if config.get("peft_version") else ""
