"""What the traffic test looks for: texts, token ids, hidden states and figures of each member."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from traffic_helpers import Group, Needles

from molora_fed.bank import Bank, Expert, build_calibration_bank, build_held_out_bank
from molora_fed.corpus.blocks import Blocks
from molora_fed.evaluation.bootstrap import ClusterIndex
from molora_fed.routing.fused import FusedModel
from molora_fed.types import Split

__all__ = [
    "ALONE",
    "DECOYS",
    "ONE_OF_SEVERAL",
    "add_figures",
    "add_texts",
    "build_bank",
    "build_banks",
    "list_runs",
]

RUN = 8
"""Consecutive ids, dimensions, or half-precision figures that make a string."""
FEWEST_IDS, FEWEST_LETTERS = 4, 6
"""Runs of fewer different ids, and texts of fewer different letters, tell nothing."""
DIGITS = 9
"""Significant digits of a figure written as text; cut off there, so that longer ones hold it."""
FEWEST_DIGITS = 8
"""A figure whose shortest text has fewer is looked for as the longer one of double precision."""
ALONE = "sums of a member alone in its domain"
ONE_OF_SEVERAL = "sums of one of several members"
"""Kinds of sums over all documents of a member: those of each loss, its square and its product with
the documents' sizes."""
DECOYS = "decoy of "
"""Begins the kind of figures that nobody has: each figure changed in its last bits or digits. As
many of them are found by chance as of the others."""
_INTEGERS = {"int16": "<i2", "int32": "<i4", "int64": "<i8", "float32": "<f4", "float64": "<f8"}
_PLAIN = "too plain to tell anything"


def _encode(text: str) -> Iterator[tuple[str, bytes]]:
    yield "utf-8", text.encode()
    yield "utf-16", text.encode("utf-16-le")
    for form, ascii_only in (("json", False), ("json, ascii", True)):
        escaped = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        if escaped != text:
            yield form, escaped.encode()


def add_texts(needles: Needles, owner: str, blocks: dict[Split, Blocks], tokenizer: Any) -> None:
    """Texts and token ids of all splits of a member."""
    for split, part in blocks.items():
        ordered = part.in_text_order() or part
        flat = ordered.tokens.reshape(-1)
        _add_ids(needles, owner, f"token ids, {split}", flat)
        text = tokenizer.decode(flat.tolist())
        pieces = {line for line in text.splitlines() if len(line) >= 20}
        spans = [one.span() for one in re.finditer(r"\S+", text)]
        for first, last in zip(spans, spans[4:], strict=False):
            pieces.add(text[first[0] : last[1]])
        kind = f"text, {split}"
        plain = {one for one in pieces if len(set(one)) < FEWEST_LETTERS or len(one.encode()) < 8}
        needles.note_dropped(kind, _PLAIN, len(plain))
        for piece in sorted(pieces - plain):
            for form, data in _encode(piece):
                needles.add(Group(owner, kind, form), [data])


def _add_ids(needles: Needles, owner: str, kind: str, ids: NDArray[Any]) -> None:
    rows = np.unique(np.lib.stride_tricks.sliding_window_view(ids, RUN), axis=0)
    several = (np.diff(np.sort(rows, axis=1), axis=1) > 0).sum(axis=1) + 1 >= FEWEST_IDS
    needles.note_dropped(kind, _PLAIN, int((~several).sum()))
    rows = rows[several]
    for form, dtype in _INTEGERS.items():
        needles.add(Group(owner, kind, form), map(bytes, _rows(rows.astype(dtype))))
    for separator in (",", ", ", " "):
        strings = (separator.join(map(str, row)).encode() for row in rows.tolist())
        form = f"decimal, '{separator}'"
        needles.add(Group(owner, kind, form), (one for one in strings if len(one) >= 16))
    for form, shift in (("varint", 0), ("zigzag varint", 1)):
        packed = (b"".join(_varint(one << shift) for one in row) for row in rows.tolist())
        needles.add(Group(owner, kind, form), packed)


def list_runs(tokens: NDArray[Any]) -> set[bytes]:
    """All runs of ids inside blocks (N, T), as int32."""
    rows = np.lib.stride_tricks.sliding_window_view(tokens, RUN, axis=1)
    return set(_rows(rows.reshape(-1, RUN).astype("<i4")))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _rows(array: NDArray[Any]) -> Iterable[bytes]:
    """The bytes of each row."""
    width = array.shape[1] * array.dtype.itemsize
    data = np.ascontiguousarray(array).tobytes()
    return (data[at : at + width] for at in range(0, len(data), width))


def build_banks(
    fused: FusedModel, blocks: dict[Split, Blocks], folder: Path, *, batch: int, limit: int
) -> dict[Split, Bank]:
    """What a member can measure at home: base and experts over its own blocks.

    Args:
        fused: The experts.
        blocks: Its blocks.
        folder: Where columns are kept.
        batch: Blocks per forward pass, the charter's: the last bits of losses depend on it.
        limit: Blocks of a split at most, a multiple of `batch`.
    """
    return {
        split: build_bank(fused, blocks[split].take(limit), folder, batch=batch)
        for split in (Split.CALIBRATION, Split.ADMISSION, Split.HELD_OUT)
    }


def build_bank(fused: FusedModel, blocks: Blocks, folder: Path, *, batch: int) -> Bank:
    """The same of some blocks, a held-out bank where they are of that split."""
    build = build_held_out_bank if blocks.split == Split.HELD_OUT else build_calibration_bank
    return build(
        folder,
        fused.base,
        [Expert(one.name, one.adapter) for one in fused.experts],
        [blocks],
        readings=frozenset({"evidence", "base_hidden", "mean_hidden", "prefix_hidden"}),
        mixture=fused.mixture,
        batch=batch,
        frozen_depth=fused.frozen_depth,
    )


def add_figures(
    needles: Needles,
    owner: str,
    banks: dict[Split, Bank],
    samples: dict[Split, int],
    *,
    is_alone: bool,
) -> None:
    """Hidden states and losses of a member's blocks, and its sums of them.

    Args:
        needles: Where they are added.
        owner: The member.
        banks: See `build_banks`.
        samples: Blocks of each split that count in a fusion: of a document, those make a sum, too.
        is_alone: Whether its domain has no other member, so that the domain's sums are its own.
    """
    sums_of = ALONE if is_alone else ONE_OF_SEVERAL
    for split, bank in banks.items():
        states = {"hidden state": bank.base_hidden, "mean hidden state": bank.mean_hidden}
        for kind, column in states.items():
            if column is not None:
                _add_states(needles, owner, f"{kind}, {split}", column)
        losses = {"base": bank.base_nll()}
        losses |= {n: bank.expert_nll(e) for e, n in enumerate(bank.expert_names)}
        counts = dict.fromkeys((bank.num_blocks, min(samples[split], bank.num_blocks)))
        parts = {n: ClusterIndex.build(bank.clusters[:n], bank.domain_of[:n]) for n in counts}
        size = bank.block_size - 1
        for column in losses.values():
            array = column.numpy()
            _add_runs(needles, owner, f"losses of tokens, {split}", array)
            _add_values(needles, owner, f"loss of a token, {split}", array.reshape(-1))
            exact = array.astype(np.float64)
            _add_sums(needles, owner, f"loss of a block, {split}", exact.sum(axis=1), size)
            for n, index in parts.items():
                sums = index.sum(array[:n])
                _add_sums(needles, owner, f"loss of a document, {split}", sums, index.counts)
                if n <= samples[split]:
                    totals = np.array([sums.sum(), sums @ sums, sums @ index.counts])
                    _add_values(needles, owner, f"{sums_of}, {split}", totals)


def _add_states(needles: Needles, owner: str, kind: str, column: torch.Tensor) -> None:
    """Rows of states, each cut into runs of dimensions."""
    whole = torch.as_tensor(column).float().reshape(-1, column.shape[-1])
    width = whole.shape[1] // RUN * RUN
    runs = whole[:, :width].reshape(-1, RUN)
    runs = runs[(runs != 0).all(dim=1)]
    for form, array in (
        ("float32", runs.numpy()),
        ("float64", runs.double().numpy()),
        ("float16", runs.half().numpy()),
        ("bfloat16", runs.bfloat16().view(torch.int16).numpy()),
    ):
        needles.add(Group(owner, kind, form), _rows(array))


def _add_runs(needles: Needles, owner: str, kind: str, losses: NDArray[np.float32]) -> None:
    """Consecutive losses of tokens, as such and as log-probabilities."""
    for sign in (1, -1):
        signed = torch.from_numpy(sign * losses)
        halves = signed[:, : losses.shape[1] // RUN * RUN].reshape(-1, RUN)
        needles.add(Group(owner, kind, "float16"), _rows(halves.half().numpy()))
        brain = halves.bfloat16().view(torch.int16).numpy()
        needles.add(Group(owner, kind, "bfloat16"), _rows(brain))
        pairs = np.lib.stride_tricks.sliding_window_view(signed.numpy(), 2, axis=1)
        needles.add(Group(owner, kind, "float32"), _rows(pairs.reshape(-1, 2).astype("<f4")))


def _add_sums(
    needles: Needles, owner: str, kind: str, sums: NDArray[np.float64], counts: Any
) -> None:
    """Sums and means of a block or a document each, as such and in single precision."""
    for values in (sums, sums / counts, -sums):
        _add_values(needles, owner, kind, values)
        _add_values(needles, owner, kind, values.astype(np.float32))


def _add_values(needles: Needles, owner: str, kind: str, values: NDArray[Any]) -> None:
    """Single figures: in double precision and as text. Decoys of each beside them."""
    for name, changed in ((kind, values), (DECOYS + kind, _change(values))):
        doubles = changed.astype("<f8")
        needles.add(Group(owner, name, "float64"), _rows(doubles.reshape(-1, 1)))
        needles.add(Group(owner, name, "float64"), _rows(-doubles.reshape(-1, 1)))
        strings: set[bytes] = set()
        for value, double in zip(np.abs(changed), np.abs(doubles).tolist(), strict=True):
            strings.update(_cut(text) for text in (repr(double), str(value)))
        several = (one for one in strings if len(one) >= 8 and _count_digits(one) >= FEWEST_DIGITS)
        needles.add(Group(owner, name, "decimal"), several)


def _change(values: NDArray[Any]) -> NDArray[Any]:
    """Other values nobody has, as near as their text can tell apart."""
    return (values * (1 + 3e-6 * (1 + np.arange(values.size) % 5))).astype(values.dtype)


def _count_digits(text: bytes) -> int:
    """Significant ones of a positive number."""
    return len(text.replace(b".", b"").lstrip(b"0"))


def _cut(text: str) -> bytes:
    """A positive number as text, without what is beyond so many significant digits."""
    digits = 0
    for place, letter in enumerate(text):
        if letter in "e":
            return text[:place].encode()
        digits += letter.isdigit() and (digits > 0 or letter != "0")
        if digits == DIGITS:
            return text[: place + 1].encode()
    return text.encode()


def count(groups: Sequence[tuple[Group, int]]) -> dict[str, dict[str, int]]:
    """Numbers by kind and form, over all owners."""
    table: dict[str, dict[str, int]] = {}
    for group, number in groups:
        row = table.setdefault(group.kind, {})
        row[group.form] = row.get(group.form, 0) + number
    return table
