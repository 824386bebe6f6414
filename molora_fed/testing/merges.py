"""Conformance checks of merges, on random adapters of a tiny model.

What counts is the product B@A of every module: adapters whose factors differ and whose products are
equal are the same adapters, see docs/merges.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.errors import MoloraError
from molora_fed.guard import one_line
from molora_fed.testing.findings import (
    CheckResult,
    Remark,
    describe_raised,
    examine,
    refuse_broken,
)
from molora_fed.testing.models import build_random_adapter, build_tiny_model
from molora_fed.testing.targets import open_target, other_chance

__all__ = ["build_tiny_adapters", "check_merge_conformance", "examine_merge"]

TOLERANCE = 0.01
"""Of the size of a product: where a merge keeps the largest numbers, rounding may choose others."""


def build_tiny_adapters(
    architecture: str = "gpt_neox",
    kinds: Sequence[str] = ("lora", "svd", "delta"),
    *,
    seed: int = 0,
) -> list[Adapter]:
    """Random adapters of one tiny model, of mixed kinds and ranks.

    Args:
        architecture: See `molora_fed.testing.ARCHITECTURES`.
        kinds: Kind of each; low-rank ones get the ranks 2, 3, 4, ...
        seed: Of all numbers.

    Returns:
        As many adapters, named "adapter-0", "adapter-1", ...
    """
    model = _build_model(architecture)
    return [
        build_random_adapter(
            model, kind=kind, rank=2 + index, seed=100 * seed + index, name=f"adapter-{index}"
        )
        for index, kind in enumerate(kinds)
    ]


@cache
def _build_model(architecture: str) -> Any:
    return build_tiny_model(architecture)


def check_merge_conformance(target: Any, options: Any = None) -> None:
    """Check a merge against the whole contract, on random adapters.

    Args:
        target: What is registered: a function, or a class with options.
        options: Options of the class; its defaults if None.

    Raises:
        PluginError: Naming every rule that is broken, with what was found.
    """
    title = f"Merge '{getattr(target, '__name__', target)}'"
    refuse_broken(title, examine_merge(target, options), page="docs/hooks/merges.md")


def examine_merge(target: Any, options: Any = None) -> tuple[CheckResult, ...]:
    """What `check_merge_conformance` finds, one result a check.

    Args:
        target: What is registered: a function, or a class with options.
        options: Options of the class; its defaults if None.
    """
    try:
        subject = _Subject(open_target(target, options))
        found = subject.merge(build_tiny_adapters())
        fault = _find_fault(found, build_tiny_adapters())
    except (Exception, SystemExit) as error:
        fault = f"expected an Adapter, got {describe_raised(error)}"
    if fault is not None:  # nothing else can be asked of it
        return (CheckResult("merges adapters of mixed kinds and ranks", fault),)
    return (CheckResult("merges adapters of mixed kinds and ranks"), *examine(_CHECKS, subject))


@dataclass(frozen=True)
class _Subject:
    target: Callable[..., Any]

    def merge(self, adapters: Sequence[Adapter], seed: int = 0) -> Any:
        return self.target(adapters, name="merged", seed=seed)


def _find_fault(merged: Any, adapters: Sequence[Adapter]) -> str | None:
    """Describe what a merge may not give of these adapters, or None."""
    if not isinstance(merged, Adapter):
        return f"expected an Adapter, got {type(merged).__name__}"
    shapes = {module: update.shape for one in adapters for module, update in one.updates.items()}
    if not merged.updates:
        return "expected updates of modules that an adapter changes, got none"
    for module, update in merged.updates.items():
        if module not in shapes:
            return f"expected updates of modules that an adapter changes, got '{module}'"
        if tuple(update.shape) != tuple(shapes[module]):
            return f"expected an update {shapes[module]} of '{module}', got {update.shape}"
        if not all(bool(tensor.isfinite().all()) for tensor in update.tensors().values()):
            return f"expected a finite update of '{module}', got NaN or infinity"
    if len(merged.hash) != 64 or not set(merged.hash) <= set("0123456789abcdef"):
        return f"expected a SHA-256 as hash, got '{one_line(str(merged.hash), 80)}'"
    return None


def _rescaling_factors_changes_nothing(subject: _Subject) -> str | None:
    """A and B as 4 A and B / 4: powers of two, so that the products are equal to the bit."""

    def rescale(update: LinearUpdate) -> LinearUpdate:
        if update.a is None or update.b is None:
            return update
        return replace(update, a=4 * update.a, b=update.b / 4)

    return _compare(subject, rescale, "with factors 4 A and B / 4")


def _padding_ranks_changes_nothing(subject: _Subject) -> str | None:
    def pad(update: LinearUpdate) -> LinearUpdate:
        if update.a is None or update.b is None:
            return update
        rows, columns = torch.zeros(2, update.a.shape[1]), torch.zeros(update.b.shape[0], 2)
        return replace(update, a=torch.cat([update.a, rows]), b=torch.cat([update.b, columns], 1))

    return _compare(subject, pad, "with two ranks of zeros more")


def _dense_or_in_factors_is_the_same(subject: _Subject) -> str | None:
    def multiply_out(update: LinearUpdate) -> LinearUpdate:
        return LinearUpdate(dense=update.product(), bias=update.bias)

    return _compare(subject, multiply_out, "with B@A multiplied out")


def _compare(
    subject: _Subject, change: Callable[[LinearUpdate], LinearUpdate], how: str
) -> str | None:
    """Merge adapters and the same ones in another form; hashes, which order them, stay."""
    plain = build_tiny_adapters()
    # The first alone: what averages factors would not notice it if all were changed alike.
    changed = [_map_updates(plain[0], change), *plain[1:]]
    one, two = subject.merge(plain), subject.merge(changed)
    for module, update in one.updates.items():
        expected = update.product()
        other = two.updates[module].product()
        difference = float((other - expected).norm() / expected.norm().clamp(min=1e-12))
        if difference > TOLERANCE:
            return (
                f"expected the same merge {how}, got '{module}' that differs by "
                f"{100 * difference:.0f} %: merge products B@A, not factors"
            )
    return None


def _map_updates(adapter: Adapter, change: Callable[[LinearUpdate], LinearUpdate]) -> Adapter:
    return replace(adapter, updates={name: change(one) for name, one in adapter.updates.items()})


def _same_seed_same_bytes(subject: _Subject) -> str | None:
    one = subject.merge(build_tiny_adapters(), seed=3)
    with other_chance():
        two = subject.merge(build_tiny_adapters(), seed=3)
    if one.hash == two.hash and _same(_list_tensors(one), _list_tensors(two)):
        return None
    return "expected the same adapter from the same adapters and seed, got another"


def _its_hash_tells_what_was_merged(subject: _Subject) -> str | None:
    """A bank keeps a merge's losses under its hash."""
    made = [(0, 0), (0, 1), (1, 0)]  # seed of the adapters, seed of the merge
    merged = [subject.merge(build_tiny_adapters(seed=seed), seed=draw) for seed, draw in made]
    for index, one in enumerate(merged):
        for other in merged[:index]:
            if one.hash == other.hash and not _same(_list_tensors(one), _list_tensors(other)):
                return "expected another hash where other adapters or seeds give others, got one"
    return None


def _leaves_its_adapters_unchanged(subject: _Subject) -> str | None:
    adapters = build_tiny_adapters()
    before = [{n: t.clone() for n, t in _list_tensors(one).items()} for one in adapters]
    names = [one.hash for one in adapters]
    subject.merge(adapters)
    after = [_list_tensors(one) for one in adapters]
    same = all(_same(one, other) for one, other in zip(before, after, strict=False))
    if same and len(adapters) == len(before) and [one.hash for one in adapters] == names:
        return None
    return "expected the adapters as they were, got them changed (change copies: `.clone()`)"


def _nothing_stays_nothing(subject: _Subject) -> str | None:
    def silence(update: LinearUpdate) -> LinearUpdate:
        return LinearUpdate(dense=torch.zeros(update.shape))

    adapters = [_map_updates(adapter, silence) for adapter in build_tiny_adapters()]
    merged = subject.merge(adapters)
    fault = _find_fault(merged, adapters)
    if fault is None and any(bool(t.any()) for t in _list_products(merged).values()):
        fault = "expected no change of adapters that change nothing, got some"
    return fault


def _takes_one_adapter_and_many(subject: _Subject) -> str | None:
    """Refusing to merge one is an answer, too, where it is an error that says so."""
    said = []
    for count in (1, 2, 16):
        adapters = build_tiny_adapters(kinds=("lora",) * count)
        try:
            merged = subject.merge(adapters)
        except MoloraError as error:
            if count == 1:
                said.append(f"one alone is refused: {one_line(str(error), 120)}")
                continue
            return f"expected a merge of {count} adapters, got {describe_raised(error)}"
        fault = _find_fault(merged, adapters)
        if fault is not None:
            return f"{fault}, of {count} adapters"
        if count == 1:
            own, found = _list_products(adapters[0]), _list_products(merged)
            same = all(torch.allclose(own[n], found[n], atol=1e-5) for n in found)
            said.append("one alone stays itself" if same else "one alone is changed")
    return Remark("; ".join(said))


def _refuses_to_merge_none(subject: _Subject) -> str | None:
    try:
        merged = subject.merge([])
    except (MoloraError, ValueError, IndexError):
        return None
    return f"expected an error without any adapter, got {type(merged).__name__}"


_CHECKS: tuple[Callable[[_Subject], str | None], ...] = (
    _rescaling_factors_changes_nothing,
    _padding_ranks_changes_nothing,
    _dense_or_in_factors_is_the_same,
    _same_seed_same_bytes,
    _its_hash_tells_what_was_merged,
    _leaves_its_adapters_unchanged,
    _nothing_stays_nothing,
    _takes_one_adapter_and_many,
    _refuses_to_merge_none,
)


def _list_tensors(adapter: Adapter) -> dict[str, Tensor]:
    return {
        f"{module}.{name}": tensor
        for module, update in adapter.updates.items()
        for name, tensor in update.tensors().items()
    }


def _list_products(adapter: Adapter) -> dict[str, Tensor]:
    return {module: update.product() for module, update in adapter.updates.items()}


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
