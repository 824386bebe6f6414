"""PEFT folders that plain PEFT loads with its plain scale `alpha / r`.

rsLoRA's scale `alpha / sqrt(r)` is in a flag that tools downstream of PEFT do not all read (peft
issue 3761), so it is written as the alpha that gives the same quotient.
"""

from dataclasses import dataclass
from pathlib import Path

from molora_fed.adapters.compatibility import check_adapter_fits
from molora_fed.adapters.files import AdapterMeta
from molora_fed.adapters.low_rank_files import write_low_rank
from molora_fed.adapters.save import choose_factor_kind
from molora_fed.adapters.updates import Adapter, LinearUpdate, truncate
from molora_fed.errors import AdapterError
from molora_fed.export.subject import Specialist
from molora_fed.models.base import Base
from molora_fed.models.layout import is_transposed
from molora_fed.storage.files import canonical_json, hash_bytes

__all__ = ["Approximation", "approximate", "write_peft"]


@dataclass(frozen=True, eq=False)
class Approximation:
    """A specialist as factors, and what that loses.

    Attributes:
        specialist: The low-rank form.
        lost_fraction: Share of the weights' difference that is lost, by Frobenius norm.
        lost_biases: Changes of biases that are left out.
    """

    specialist: Specialist
    lost_fraction: float
    lost_biases: int


def approximate(specialist: Specialist, rank: int) -> Approximation:
    """Factors of at most rank R for every module that has none; others stay as they are.

    Args:
        specialist: Of any kind.
        rank: R.
    """
    updates: dict[str, LinearUpdate] = {}
    total = lost = 0.0
    biases = 0
    for module, update in specialist.adapter.updates.items():
        product = update.product()
        total += float(product.double().square().sum())
        biases += update.bias is not None
        if update.a is not None and update.b is not None:
            updates[module] = LinearUpdate(a=update.a, b=update.b, scale=update.scale)
            continue
        a, b = truncate(product, rank)
        updates[module] = LinearUpdate(a=a.contiguous(), b=b.contiguous())
        lost += float((product - b @ a).double().square().sum())
    adapter = specialist.adapter
    made = Adapter(
        name=adapter.name,
        kind="svd",
        frozen_depth=adapter.frozen_depth,
        updates=updates,
        hash=hash_bytes(canonical_json(["approximated", adapter.hash, rank])),
        num_bytes=sum(t.nbytes for u in updates.values() for t in u.tensors().values()),
        base_weights=adapter.base_weights,
    )
    found = Specialist(specialist.name, made, specialist.domain)
    return Approximation(found, (lost / total) ** 0.5 if total else 0.0, biases)


def write_peft(adapter: Adapter, base: Base, folder: Path) -> None:
    """Write a low-rank adapter as a PEFT folder with the scale alpha / r.

    Numbers keep their dtype; modules are named in full, so that no other of the base matches.

    Args:
        adapter: Low-rank in all modules, without changes of biases.
        base: The base it is for.
        folder: Target, replaced whole or not at all.

    Raises:
        IncompatibleAdapterError: If it does not fit the base.
        AdapterError: If some modules are Conv1D and others are not: PEFT has one flag for all.
        StorageError: On I/O errors.
    """
    check_adapter_fits(adapter, base.model)
    transposed = {is_transposed(base.model.get_submodule(module)) for module in adapter.updates}
    if len(transposed) > 1:
        raise AdapterError(
            f"Cannot write '{adapter.name}' for PEFT: expected modules of one orientation, got "
            "Conv1D and Linear together. Export it with --to merged --as checkpoint."
        )
    meta = AdapterMeta(
        kind=choose_factor_kind(adapter.kind),
        frozen_depth=adapter.frozen_depth,
        base_weights=adapter.base_weights or base.weights,
    )
    write_low_rank(
        folder,
        adapter.updates,
        meta,
        transposed=transposed == {True},
        use_rslora=False,
        base_name=base.id,
    )
