"""Keys of a LoRA file, taken apart: module, part, adapter name, and what was put around them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from molora_fed.adapters.headers import TensorHeader, describe_unreadable
from molora_fed.adapters.peft_config import MERGE

__all__ = ["Factor", "KeptTensor", "check_orientation", "read_keys"]

_PARTS = frozenset(
    {"lora_A", "lora_B", "lora_a", "lora_b", "lora_embedding_A", "lora_embedding_B",
     "lora_magnitude_vector", "lora_E", "lora_ranknum"}
)  # fmt: skip
_PEFT_PREFIX = ("base_model", "model")
_WRAPPERS = frozenset({"module", "base_layer", "inner_module", "orig_module"})
_HEADS = frozenset(
    {"score", "classifier", "classification", "qa", "v", "value", "summary", "regression"}
)


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that is no factor: a whole weight, or rows of one, that was saved along.

    Attributes:
        key: Its key in the file.
        path: Name of the parameter as the file has it, without wrappers.
        is_rows: Whether it holds single rows of it, those the config names.
    """

    key: str
    path: str
    is_rows: bool = False


@dataclass(frozen=True)
class Factor:
    """One factor: its key in the file, its module's path without wrappers, and which it is."""

    key: str
    path: tuple[str, ...]
    part: str


def _is_wrapper(segment: str) -> bool:
    """Whether a part of a name is what torch or PEFT puts around a module."""
    return segment.startswith("_") or segment in _WRAPPERS or "wrapped" in segment


def _strip(path: Sequence[str]) -> tuple[str, ...]:
    """A path without wrappers and without PEFT's prefix, however often it is there."""
    found = tuple(segment for segment in path if not _is_wrapper(segment))
    while found[:2] == _PEFT_PREFIX and len(found) > 2:
        found = found[2:]
    return found


def read_keys(
    headers: Mapping[str, TensorHeader], name: str
) -> tuple[list[Factor], list[KeptTensor], list[str]]:
    """Take keys apart, and refuse what is no plain LoRA."""
    factors, kept, notes = [], [], []
    adapters: Counter[tuple[str, ...]] = Counter()
    wrapped: Counter[str] = Counter()
    doubled = missing = 0
    for key in headers:
        segments = key.split(".")
        place = next((i for i, each in enumerate(segments) if each in _PARTS), None)
        if place is None or place == 0:
            kept.append(_read_kept(key, segments, name))
            continue
        path, part, tail = segments[:place], segments[place], segments[place + 1 :]
        inner = tuple(each for each in tail if not _is_wrapper(each))
        _check_part(key, part, inner, headers[key], name)
        adapters[tuple(each for each in inner if each != "weight")] += 1
        wrapped.update({each for each in [*path, *tail] if _is_wrapper(each)})
        bare = tuple(each for each in path if not _is_wrapper(each))
        doubled += bare[2:4] == _PEFT_PREFIX and bare[:2] == _PEFT_PREFIX
        missing += bare[:2] != _PEFT_PREFIX
        factors.append(Factor(key, _strip(path), part))
    if len(adapters) > 1:
        names = ", ".join(sorted(repr(".".join(each)) for each in adapters)[:5])
        raise describe_unreadable(
            name,
            expected="one adapter in the file",
            got=f"keys of {len(adapters)}: {names}",
            fix="Save one with model.save_pretrained(OUT, selected_adapters=[NAME]).",
        )
    if not factors:
        raise describe_unreadable(
            name,
            expected="tensors lora_A and lora_B",
            got=", ".join(f"extra tensor '{each.key}'" for each in kept[:3]),
            fix="Point to the folder of a LoRA that PEFT saved.",
        )
    for adapter in adapters:
        if adapter:
            notes.append(f"adapter name '{'.'.join(adapter)}' in the keys taken off")
    notes += [f"wrapper '{each}' in the keys taken off" for each in sorted(wrapped)]
    if doubled:
        notes.append("prefix 'base_model.model' was there twice")
    if missing:
        notes.append("prefix 'base_model.model' was missing")
    return factors, kept, notes


def _check_part(key: str, part: str, inner: Sequence[str], header: TensorHeader, name: str) -> None:
    """Refuse tensors that no plain LoRA has."""
    if part in ("lora_E", "lora_ranknum"):
        raise describe_unreadable(
            name, expected="a plain LoRA", got=f"'{key}', of AdaLoRA", fix=MERGE
        )
    if part.startswith("lora_embedding"):
        raise describe_unreadable(
            name,
            expected="factors of linear layers alone",
            got=f"'{key}': the embedding is changed, by target_modules",
            fix="Train it again without the embedding among target_modules.",
        )
    if part in ("lora_A", "lora_B") and inner and inner[-1] == "bias":
        raise describe_unreadable(
            name, expected="factors without bias", got=f"'{key}', of lora_bias", fix=MERGE
        )
    if part in ("lora_A", "lora_B") and len(header.shape) != 2:
        raise describe_unreadable(
            name,
            expected="factors of two dimensions",
            got=f"'{key}' of shape {header.shape}"
            + (": factors of fused expert weights" if len(header.shape) == 3 else ""),
            fix="Train it again with target_modules that name linear layers.",
        )


def check_orientation(
    factors: Sequence[Factor], headers: Mapping[str, TensorHeader], name: str
) -> None:
    """Refuse factors of other programs, whose names or orientation differ."""
    lower = [factor for factor in factors if factor.part in ("lora_a", "lora_b")]
    if not lower:
        return
    if lower[0].key.endswith((".lora_a", ".lora_b")):
        raise describe_unreadable(
            name,
            expected="factors lora_A (R, D_in) and lora_B (D_out, R) of PEFT",
            got=f"'{lower[0].key}' of shape {headers[lower[0].key].shape}: MLX's, which lie the "
            "other way round",
            fix="Merge it with `mlx_lm.fuse --model BASE --adapter-path FOLDER --save-path OUT`, "
            "and pass OUT to `molora contribute --checkpoint`.",
        )
    raise describe_unreadable(
        name,
        expected="factors lora_A and lora_B of PEFT",
        got=f"'{lower[0].key}', under torchtune's own names",
        fix="Save it with torchtune's FullModelHFCheckpointer, which writes PEFT's format.",
    )


def _read_kept(key: str, segments: Sequence[str], name: str) -> KeptTensor:
    """A tensor that is no factor: which parameter it is a copy of."""
    if "trainable_tokens_delta" in segments or "trainable_tokens_original" in segments:
        place = next(i for i, each in enumerate(segments) if each.startswith("trainable_tokens"))
        path = [each for each in segments[:place] if each != "token_adapter"]
        return KeptTensor(key, ".".join([*_strip(path), "weight"]), is_rows=True)
    path = list(segments)
    for marker in ("modules_to_save", "original_module"):
        if marker in path:
            place = path.index(marker)
            # What follows is an adapter's name, except for the parameter's own.
            path = [*path[:place], *path[place + 1 :][-1:]]
    found = _strip(path) or (key,)
    owner = found[-2].split("_") if len(found) > 1 else [found[0]]
    if owner[0] in _HEADS and not any(each.isdecimal() for each in found):
        raise describe_unreadable(
            name,
            expected="an adapter of a causal language model",
            got=f"'{key}': the head of a classifier or a value model",
            fix="Train it again with task_type CAUSAL_LM.",
        )
    return KeptTensor(key, ".".join(found))
