"""Warnings about chat templates: tokens that the base never trained, and templates that differ.

Embedding and head stay the base's, so that a token whose row was never trained stays noise: a
specialist that was taught to end with it cannot.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora_fed.models.base import Base
from molora_fed.storage.untrusted import clean, parse_json

__all__ = ["find_chat_warnings", "find_untrained"]

_MAX_TEMPLATE_BYTES = 2**20
_MAX_CONFIG_BYTES = 8 * 2**20
_MOST_TOKENS = 64  # of one template that are looked at
_SHOWN = 5
_CLOSE = 0.05
"""Share of the usual norm, or distance from the mean, below which a row counts as untrained."""
_FIRST = 8  # dimensions by which equal rows are looked for before they are compared whole


def find_chat_warnings(base: Base, adapter: Path | None = None) -> list[str]:
    """What to know before text of a chat template is trained or generated on a base.

    Args:
        base: The base, whose tokenizer may have a template.
        adapter: Folder of an adapter made elsewhere, whose tokenizer files may have another.

    Returns:
        One line each; empty if there is nothing to warn of.
    """
    own = base.tokenizer.chat_template
    own = own if isinstance(own, str) else ""
    other = "" if adapter is None else read_template(adapter)
    warnings = []
    if other and other.strip() != own.strip():
        warnings.append(
            "The adapter's tokenizer has "
            + ("another chat template than the base's" if own else "a chat template, the base none")
            + ": the fused model is prompted by the base's. Format your text by one template."
        )
    found = find_untrained(base, own + other)
    if found:
        shown = ", ".join(f"'{clean(token, 40)}'" for token in list(found)[:_SHOWN])
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        warnings.append(
            f"The chat template uses {shown}{more}, which the base never trained "
            f"({next(iter(found.values()))}), and embedding and head stay the base's: a specialist "
            "cannot learn to read or to end with it. Use a template of trained tokens."
        )
    return warnings


def find_untrained(base: Base, template: str) -> dict[str, str]:
    """Tokens of a template whose embedding row looks as if it was never trained, and why.

    A row is untrained if it is zero or very short, another token's bit for bit, or the mean of all.

    Source: own definition.
    """
    vocabulary: Mapping[str, int] = base.tokenizer.get_added_vocab()
    used = [(token, i) for token, i in vocabulary.items() if token and token in template]
    weight: Tensor = base.model.get_input_embeddings().weight.detach()
    used = [(token, i) for token, i in used if i < weight.shape[0]][:_MOST_TOKENS]
    if not used:
        return {}
    step = max(1, weight.shape[0] // 2_048)
    sample = weight[::step].float()
    mean = sample.mean(0)
    usual_norm = float(sample.norm(dim=1).median())
    usual_distance = float((sample - mean).norm(dim=1).median())
    found = {}
    for token, i in used:
        row = weight[i]
        reason = ""
        if float(row.float().norm()) <= _CLOSE * usual_norm:
            reason = "its embedding is zero, or nearly"
        elif float((row.float() - mean).norm()) <= _CLOSE * usual_distance:
            reason = "its embedding is the mean of all"
        elif _count_equal(weight, row) > 1:
            reason = "its embedding is another token's, too"
        if reason:
            found[token] = reason
    return found


def _count_equal(weight: Tensor, row: Tensor) -> int:
    alike = (weight[:, :_FIRST] == row[:_FIRST]).all(1).nonzero().flatten()
    return sum(bool(torch.equal(weight[place], row)) for place in alike[:_MOST_TOKENS])


def read_template(folder: Path) -> str:
    """The chat template in a folder's tokenizer files, as text; "" if there is none to read."""
    try:
        path = folder / "chat_template.jinja"
        if path.is_file() and path.stat().st_size <= _MAX_TEMPLATE_BYTES:
            return path.read_text(encoding="utf-8")
        path = folder / "tokenizer_config.json"
        if not path.is_file() or path.stat().st_size > _MAX_CONFIG_BYTES:
            return ""
        content: Any = parse_json(path.read_bytes(), max_bytes=_MAX_CONFIG_BYTES)
    except (OSError, ValueError):
        return ""
    found = content.get("chat_template") if isinstance(content, dict) else None
    return found if isinstance(found, str) and len(found) <= _MAX_TEMPLATE_BYTES else ""
