"""Rounds matrices to a few bits per number, with one scale for every few numbers of a row.

A number is `(stored - offset) * scale`, nothing else: no zero point of a group, no table. At 4 and
8 bits the offset is 2^(b-1) and levels run from -(2^(b-1) - 1) to 2^(b-1) - 1; at 2 bits it is 1.5,
so that all four levels (-1.5, -0.5, 0.5, 1.5) are used. The first number lies in the low bits of a
byte, every row begins at a byte of its own. Scales are bfloat16: float32's range in two bytes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from molora_fed.errors import AdapterError

__all__ = ["BITS", "Bits", "Quantised", "count_row_bytes", "count_scales", "dequantise", "quantise"]

Bits = Literal[2, 4, 8]
BITS: tuple[Bits, ...] = (2, 4, 8)

# Shares of a group's largest number that are tried as the largest level.
_CLIPS = {
    2: tuple(1.0 - 0.05 * i for i in range(17)),
    4: tuple(1.0 - 0.025 * i for i in range(17)),
    8: tuple(1.0 - 0.025 * i for i in range(17)),
}
_TOP = {2: 1.5, 4: 7.0, 8: 127.0}
_OFFSET = {2: 1.5, 4: 8.0, 8: 128.0}


@dataclass(frozen=True, eq=False)
class Quantised:
    """A matrix of few bits.

    Attributes:
        codes: (rows, bytes of a row) uint8.
        scales: (rows, groups of a row) bfloat16.
    """

    codes: Tensor
    scales: Tensor


def count_row_bytes(columns: int, bits: int) -> int:
    """Bytes that the codes of one row take."""
    return -(-columns * bits // 8)


def count_scales(columns: int, group: int) -> int:
    """Scales of one row; the last group may be shorter."""
    return -(-columns // group)


def quantise(matrix: Tensor, bits: Bits, group: int) -> Quantised:
    """Round a matrix to b bits, each group's scale chosen for the least squared error.

    The scale is tried at several shares of what would fit the group's largest number: with few
    bits it pays to clip that one and round all others more finely. Equal matrices give equal bytes.

    Args:
        matrix: (rows, columns), finite.
        bits: b.
        group: Numbers of a row that share a scale.

    Raises:
        AdapterError: If a number is NaN or infinite.

    Source: symmetric absmax rounding by groups as in arXiv 2305.14314, section 2; the search over
    clips is own, by squared error.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise AdapterError(
            "Cannot round an adapter: expected finite numbers, got NaN or infinity. "
            "Train again with a lower learning rate."
        )
    rows, columns = matrix.shape
    groups = count_scales(columns, group)
    padded = torch.zeros(rows, groups * group)
    padded[:, :columns] = matrix
    parts = padded.view(rows, groups, group)
    is_real = (torch.arange(groups * group) < columns).view(groups, group)
    largest = parts.abs().amax(dim=2, keepdim=True)  # (rows, groups, 1)
    best_scales = torch.zeros_like(largest)
    best_levels = torch.zeros_like(parts)
    least = torch.full_like(largest, torch.inf)
    for clip in _CLIPS[bits]:
        # Rounded first, so that levels are chosen for the scale that will be read.
        scales = (largest * (clip / _TOP[bits])).bfloat16().float()
        levels = _round(torch.where(scales > 0, parts / scales, 0.0), bits)
        # In units of the group's largest number: squares of very large ones have no float32.
        misses = torch.where(is_real & (largest > 0), (parts - levels * scales) / largest, 0.0)
        error = misses.square().sum(dim=2, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best_scales = torch.where(better, scales, best_scales)
        best_levels = torch.where(better, levels, best_levels)
    levels = best_levels.reshape(rows, groups * group)[:, :columns]
    return Quantised(_pack(levels, bits), best_scales.squeeze(2).bfloat16())


def dequantise(quantised: Quantised, columns: int, bits: Bits, group: int) -> Tensor:
    """The numbers, (rows, columns) float32; what is allocated is a few times the result."""
    levels = _unpack(quantised.codes, columns, bits)
    index = torch.arange(columns, device=levels.device) // group
    return levels.mul_(quantised.scales.float()[:, index])


def _round(values: Tensor, bits: Bits) -> Tensor:
    """The nearest levels; half a step beside whole numbers where the offset is."""
    half = _OFFSET[bits] % 1.0
    return ((values - half).round() + half).clamp(-_TOP[bits], _TOP[bits])


def _pack(levels: Tensor, bits: Bits) -> Tensor:
    """Levels (rows, columns) as bytes (rows, bytes of a row)."""
    per_byte = 8 // bits
    stored = (levels + _OFFSET[bits]).to(torch.uint8)
    stored = torch.nn.functional.pad(stored, (0, -stored.shape[1] % per_byte))
    packed = stored[:, 0::per_byte].clone()
    for place in range(1, per_byte):
        packed |= stored[:, place::per_byte] << (bits * place)
    return packed


def _unpack(packed: Tensor, columns: int, bits: Bits) -> Tensor:
    """Levels (rows, columns) float32 from bytes."""
    places = [packed >> (bits * place) for place in range(8 // bits)]
    stored = torch.stack(places, dim=2).flatten(1)[:, :columns]
    return (stored & (2**bits - 1)).float().sub_(_OFFSET[bits])
