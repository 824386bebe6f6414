"""What an adapter does to a base, in numbers: how large, how concentrated, how even."""

from dataclasses import dataclass
from statistics import median

from molora_fed import Adapter, Base
from molora_fed.adapters import decompose_update

__all__ = ["Shape", "measure_shape"]


@dataclass(frozen=True)
class Shape:
    """Norms and spectra of an adapter's weight differences, over the modules it changes.

    Attributes:
        norm: Largest `|dW|_F / |W|_F` of a module.
        norm_module: The module that has it.
        share: Part of `|dW|_F^2` that a module's first singular direction holds, in (0, 1]; the
            median over modules.
        spread: Largest of the relative norms over their median.
    """

    norm: float
    norm_module: str
    share: float
    spread: float


def measure_shape(adapter: Adapter, base: Base) -> Shape | None:
    """Measure an adapter against the base that it changes; None if it changes nothing.

    Modules with a NaN or an infinity are left out: the core refuses these by themselves.

    Args:
        adapter: Its updates, low-rank or dense.
        base: The base.
    """
    norms: dict[str, float] = {}
    shares: list[float] = []
    for name, update in adapter.updates.items():
        if not all(bool(tensor.isfinite().all()) for tensor in update.tensors().values()):
            continue
        values = decompose_update(update).values
        if not bool(values.any()):
            continue
        weight = base.model.get_submodule(name).weight.detach()
        energy = values.square()
        norms[name] = float(energy.sum().sqrt() / weight.float().norm().clamp_min(1e-12))
        shares.append(float(energy.max() / energy.sum()))
    if not norms:
        return None
    largest = max(norms, key=norms.__getitem__)
    return Shape(
        norm=norms[largest],
        norm_module=largest,
        share=median(shares),
        spread=norms[largest] / median(norms.values()),
    )
