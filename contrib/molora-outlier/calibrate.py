"""What honest adapters measure, and which spoiled copies of them the check finds.

    python calibrate.py BASE_FOLDER ADAPTER_FOLDER [ADAPTER_FOLDER ...]

Every adapter is judged with the others as its peers, as it is and spoiled in four ways.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

from molora_outlier.check import OutlierCheck, OutlierOptions
from molora_outlier.shape import measure_shape

from molora_fed import Adapter, load_base
from molora_fed.adapters import LinearUpdate, decompose_update, load_adapter


def scale(adapter: Adapter, factor: float, only: str | None = None) -> Adapter:
    """The adapter, or one of its modules, times a factor."""
    updates = {
        name: update if only not in (None, name) else grow(update, factor)
        for name, update in adapter.updates.items()
    }
    return replace(adapter, updates=updates)


def grow(update: LinearUpdate, factor: float) -> LinearUpdate:
    """An update times a factor."""
    if update.dense is not None:
        return replace(update, dense=update.dense * factor)
    return replace(update, scale=update.scale * factor)


def flatten(adapter: Adapter) -> Adapter:
    """Every module's first singular direction alone, as large as the whole was."""
    updates = {}
    for name, update in adapter.updates.items():
        found = decompose_update(update)
        norm = found.values.square().sum().sqrt()
        dense = norm * found.u[:, :1] @ found.vh[:1]
        updates[name] = LinearUpdate(dense=dense)
    return replace(adapter, updates=updates)


SPOILED = {
    "times 10": lambda adapter: scale(adapter, 10),
    "times 30": lambda adapter: scale(adapter, 30),
    "one module times 30": lambda adapter: scale(adapter, 30, next(iter(adapter.updates))),
    "one direction alone": flatten,
}


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("adapters", type=Path, nargs="+")
    arguments = parser.parse_args()
    base = load_base(arguments.base)
    adapters = [load_adapter(path, model=base.model, name=path.name) for path in arguments.adapters]
    shapes = [shape for shape in (measure_shape(one, base) for one in adapters) if shape]
    print(f"{len(shapes)} adapters: smallest, median, largest")
    for name in ("norm", "share", "spread"):
        values = [getattr(shape, name) for shape in shapes]
        print(f"  {name:6s} {min(values):8.3f} {median(values):8.3f} {max(values):8.3f}")
    check = OutlierCheck(OutlierOptions())

    def judge(place: int, adapter: Adapter) -> bool:
        others = [one for number, one in enumerate(adapters) if number != place]
        manifest = SimpleNamespace(kind="any")
        candidate = SimpleNamespace(
            adapter=adapter,
            base=base,
            contribution=SimpleNamespace(manifest=manifest),
            others=[SimpleNamespace(manifest=manifest, adapter=other) for other in others],
            read_adapter=lambda other: other.adapter,
        )
        return check(candidate) is not None

    for name, spoil in {"as they are": lambda adapter: adapter, **SPOILED}.items():
        found = sum(judge(place, spoil(adapter)) for place, adapter in enumerate(adapters))
        print(f"  quarantined {name}: {found} of {len(adapters)}")


if __name__ == "__main__":
    main()
