"""Rounds matrices to a few bits per number, with one scale for every few numbers of a row.

A number is `code * scale`, nothing else: no zero point, no table. Codes of b bits run from
-(2^(b-1) - 1) to 2^(b-1) - 1 and are stored as code + 2^(b-1), first number in the low bits; every
row begins at a byte of its own. Scales are bfloat16: the range of float32, two bytes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from molora_fed.errors import AdapterError

__all__ = ["BITS", "Bits", "Quantised", "count_row_bytes", "count_scales", "dequantise", "quantise"]

Bits = Literal[4, 8]
BITS: tuple[Bits, ...] = (4, 8)

_CLIPS = tuple(1.0 - 0.025 * i for i in range(17))  # down to 0.6 of the largest number of a group


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

    The scale is tried at several shares of what would fit the group's largest number: at 4 bits
    it pays to clip that one and round all others more finely. Equal matrices give equal bytes.

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
    top = 2 ** (bits - 1) - 1
    groups = count_scales(columns, group)
    padded = torch.zeros(rows, groups * group)
    padded[:, :columns] = matrix
    parts = padded.view(rows, groups, group)
    largest = parts.abs().amax(dim=2, keepdim=True)  # (rows, groups, 1)
    best_scales = torch.zeros_like(largest)
    best_codes = torch.zeros_like(parts)
    least = torch.full_like(largest, torch.inf)
    for clip in _CLIPS:
        # Rounded first, so that codes are chosen for the scale that will be read.
        scales = (largest * (clip / top)).bfloat16().float()
        codes = torch.where(scales > 0, parts / scales, 0.0).round().clamp(-top, top)
        # In units of the group's largest number: squares of very large ones have no float32.
        misses = torch.where(largest > 0, (parts - codes * scales) / largest, 0.0)
        error = misses.square().sum(dim=2, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best_scales = torch.where(better, scales, best_scales)
        best_codes = torch.where(better, codes, best_codes)
    codes = best_codes.reshape(rows, groups * group)[:, :columns]
    return Quantised(_pack(codes, bits), best_scales.squeeze(2).bfloat16())


def dequantise(quantised: Quantised, columns: int, bits: Bits, group: int) -> Tensor:
    """The numbers, (rows, columns) float32; what is allocated is as large as the result."""
    codes = _unpack(quantised.codes, columns, bits).float()
    index = torch.arange(columns, device=codes.device) // group
    return codes.mul_(quantised.scales.float()[:, index])


def _pack(codes: Tensor, bits: Bits) -> Tensor:
    """Codes (rows, columns) as bytes (rows, bytes of a row)."""
    stored = (codes + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 8:
        return stored
    if stored.shape[1] % 2:
        stored = torch.nn.functional.pad(stored, (0, 1))
    return stored[:, 0::2] | (stored[:, 1::2] << 4)


def _unpack(stored: Tensor, columns: int, bits: Bits) -> Tensor:
    """Codes (rows, columns) int16 from bytes."""
    if bits == 4:
        stored = torch.stack([stored & 15, stored >> 4], dim=2).flatten(1)[:, :columns]
    return stored.to(torch.int16) - 2 ** (bits - 1)
