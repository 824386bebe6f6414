"""Divides a number of bytes among the directions of many differences."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from molora_fed.adapters.quantised_files import count_row_bytes, count_scales
from molora_fed.adapters.updates import LinearUpdate, Spectrum
from molora_fed.errors import AdapterError

__all__ = ["PackingCost", "compress", "divide_budget"]

_FRAME = 96  # of a safetensors file: length, metadata, padding
_ENTRY = 112  # of a tensor in its header, beside the name: dtype, shape, offsets, JSON


@dataclass(frozen=True)
class PackingCost:
    """What numbers take in a file.

    Attributes:
        bits: Bits of a number.
        group: Numbers that share a scale of two bytes; None if there are no scales.
    """

    bits: int
    group: int | None = None

    def row(self, numbers: int) -> int:
        """Bytes of a row."""
        scales = 0 if self.group is None else 2 * count_scales(numbers, self.group)
        return count_row_bytes(numbers, self.bits) + scales

    def header(self, name: str) -> int:
        """Most bytes that a module's tensors take in the file's header."""
        tensors = 2 if self.group is None else 4
        return tensors * (len(name) + len("base_model.model..lora_A.weight") + _ENTRY)


def compress(
    spectra: Mapping[str, Spectrum], *, rank: int, budget_bytes: int, cost: PackingCost
) -> dict[str, LinearUpdate]:
    """The best factors of several matrices that fit a file, by summed squared error.

    Args:
        spectra: Differences by module name.
        rank: Largest rank of each.
        budget_bytes: Largest weights file.
        cost: What numbers take.

    Returns:
        Low-rank updates; a module that gets no direction is left out.

    Raises:
        AdapterError: If not even one direction fits.
    """
    ranks = divide_budget(
        {module: spectrum.values[:rank] for module, spectrum in spectra.items()},
        {module: spectrum.shape for module, spectrum in spectra.items()},
        budget_bytes=budget_bytes,
        cost=cost,
    )
    if not ranks:
        raise AdapterError(
            "Cannot export an adapter: expected a budget that holds one direction of one layer, "
            f"got {budget_bytes} bytes. Raise budget_bytes."
        )
    factors = {module: spectra[module].factors(kept) for module, kept in ranks.items()}
    return {module: LinearUpdate(a=a, b=b) for module, (a, b) in factors.items()}


def divide_budget(
    values: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    *,
    budget_bytes: int,
    cost: PackingCost,
) -> dict[str, int]:
    """Choose ranks by module: directions by squared singular value per byte, while they fit.

    Args:
        values: Singular values by module, falling.
        shapes: (D_out, D_in) by module.
        budget_bytes: Largest weights file.
        cost: What numbers take.

    Returns:
        Ranks >= 1 in the modules' order; others are left out.

    Source: own definition; greedy rule of the knapsack problem (Dantzig 1957).
    """
    price = {m: cost.row(rows) + cost.row(columns) for m, (rows, columns) in shapes.items()}
    candidates = sorted(
        (
            (-(float(value) ** 2) / price[module], index, module)
            for module, spectrum in values.items()
            for index, value in enumerate(spectrum.tolist())
        ),
    )
    left = budget_bytes - _FRAME
    ranks: dict[str, int] = {}
    full: set[str] = set()
    for _, _, module in candidates:
        if module in full:
            continue
        wanted = price[module] + (0 if module in ranks else cost.header(module))
        if wanted > left:
            full.add(module)  # its later directions are smaller and cost the same
            continue
        left -= wanted
        ranks[module] = ranks.get(module, 0) + 1
    return {module: ranks[module] for module in values if module in ranks}
