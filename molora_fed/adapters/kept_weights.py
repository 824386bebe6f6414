"""Whole weights that a LoRA file holds beside its factors, held against the base's own.

Trainers save embedding and head along: equal to the base's bit for bit they are left out without
loss, anything else is refused, naming the tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora_fed.adapters.headers import TensorHeader, describe_unreadable, opened
from molora_fed.adapters.limits import BaseLimits
from molora_fed.adapters.peft_config import LoraSettings
from molora_fed.adapters.peft_folder import describe_cause
from molora_fed.adapters.peft_keys import KeptTensor
from molora_fed.storage.files import is_file
from molora_fed.storage.untrusted import clean, parse_json

__all__ = ["check_kept_weights"]

_FIX = (
    "Leave it out with `molora adapter convert FOLDER OUT --base BASE --drop-saved` and see what "
    "that costs, or train again with all but the factors frozen and no new tokens."
)
_ROWS = 4_096  # compared at a time
_SHOWN = 8  # tokens named
_MAX_TOKENIZER_BYTES = 64 * 2**20


def check_kept_weights(
    folder: Path,
    paths: Sequence[Path],
    kept: Sequence[KeptTensor],
    headers: Mapping[str, TensorHeader],
    settings: LoraSettings,
    limits: BaseLimits,
    name: str,
) -> None:
    """Refuse whole weights that are not the base's own, bit by bit.

    Rows of a smaller vocabulary are compared as far as they go.

    Args:
        folder: The adapter's folder, whose tokenizer names tokens that the base does not have.
        paths: Its weights file, or the shards.
        kept: What is compared.
        headers: Every tensor's header.
        settings: The config.
        limits: With the base model.
        name: The adapter's name, for errors.

    Raises:
        AdapterError: Naming the weight and the tokens that differ.
    """
    parameters = dict(limits.model.named_parameters(remove_duplicate=False))
    by_key = {each.key: each for each in kept}
    for path in paths:
        with opened(path, name, framework="pt") as file:
            for key in sorted(by_key.keys() & set(file.keys())):
                own = _find_parameter(by_key[key].path, parameters)
                found = _find_difference(
                    file, by_key[key], headers[key], own, settings, folder, limits.tokenizer
                )
                if found:
                    raise describe_unreadable(
                        name,
                        expected="embedding, head and all but the factors bit-identical to the "
                        "base",
                        got=f"extra tensor '{key}' "
                        f"({describe_cause([by_key[key]], settings)}): {found}",
                        fix=_FIX,
                    )


def _find_parameter(path: str, parameters: Mapping[str, Tensor]) -> Tensor | None:
    """The base's parameter of that name, or the only one whose name ends alike."""
    if path in parameters:
        return parameters[path]
    segments = path.split(".")
    for start in range(1, len(segments) - 1):
        ending = "." + ".".join(segments[start:])
        found = [p for n, p in parameters.items() if f".{n}".endswith(ending)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _find_difference(
    file: Any,
    kept: KeptTensor,
    header: TensorHeader,
    own: Tensor | None,
    settings: LoraSettings,
    folder: Path,
    tokenizer: Any,
) -> str:
    """Say in what a saved weight differs from the base's; "" if it does not."""
    if own is None:
        return "a weight that the base does not have"
    if header.dtype not in ("F32", "F16", "BF16"):
        return f"numbers of type {header.dtype}"
    rows = list(settings.token_indices) if kept.is_rows else None
    if rows is not None and (
        header.shape[:1] != (len(rows),) or not _are_within(rows, own.shape[0])
    ):
        return f"rows of tokens {_name_tokens(rows, folder, tokenizer)}"
    if len(header.shape) != own.ndim or tuple(header.shape[1:]) != tuple(own.shape[1:]):
        return f"shape {header.shape} instead of {tuple(own.shape)}"
    part = file.get_slice(kept.key)
    if own.ndim < 2:
        same = header.shape == tuple(own.shape) and torch.equal(part[:].float(), own.float())
        return "" if same else "other numbers"
    count = header.shape[0] if rows is not None else min(header.shape[0], own.shape[0])
    changed: list[int] = []
    for start in range(0, count, _ROWS):
        stop = min(start + _ROWS, count)
        base = own[rows[start:stop]] if rows is not None else own[start:stop]
        differs = (part[start:stop].float() != base.float()).flatten(1).any(1)
        changed += [start + int(place) for place in differs.nonzero().flatten()]
    if rows is not None:
        changed = [rows[place] for place in changed]
    texts = []
    if changed:
        texts.append(f"{len(changed)} changed rows, {_name_tokens(changed, folder, tokenizer)}")
    if rows is None and header.shape[0] > own.shape[0]:
        added = range(own.shape[0], header.shape[0])
        texts.append(f"{len(added)} added rows, {_name_tokens(added, folder, tokenizer)}")
    return " and ".join(texts)


def _are_within(rows: Iterable[int], count: int) -> bool:
    return all(0 <= row < count for row in rows)


def _name_tokens(ids: Sequence[int], folder: Path, tokenizer: Any) -> str:
    """Tokens by text where a tokenizer knows them, and by id."""
    shown = [int(each) for each in ids[:_SHOWN]]
    known = {} if tokenizer is None else _convert(shown, tokenizer)
    known = {**_read_added_tokens(folder), **known}
    texts = [f"'{clean(known[i], 40)}' ({i})" if i in known else f"token {i}" for i in shown]
    more = len(ids) - len(shown)
    return ", ".join(texts) + (f" and {more} more" if more > 0 else "")


def _convert(ids: Sequence[int], tokenizer: Any) -> dict[int, str]:
    return {i: str(tokenizer.convert_ids_to_tokens(i)) for i in ids if 0 <= i < len(tokenizer)}


def _read_added_tokens(folder: Path) -> dict[int, str]:
    """Tokens that the tokenizer beside an adapter adds, by id; empty if it cannot be read."""
    path = folder / "tokenizer.json"
    try:
        if not is_file(path) or path.stat().st_size > _MAX_TOKENIZER_BYTES:
            return {}
        content = parse_json(path.read_bytes(), max_bytes=_MAX_TOKENIZER_BYTES)
        added = content.get("added_tokens") if isinstance(content, dict) else None
        return {
            each["id"]: str(each["content"])
            for each in (added if isinstance(added, list) else ())
            if isinstance(each, dict) and type(each.get("id")) is int and "content" in each
        }
    except (OSError, ValueError):
        return {}
