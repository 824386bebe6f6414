"""Conformance checks of what computes carried files, on tiny random models and made-up text.

`check_carried_files_conformance(compute_gates)` is the whole test such a plugin needs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molora_fed.adapters.carried_files import encode_carried, find_carried_fault
from molora_fed.charter import TrainingRules
from molora_fed.contributions.carried import CarriedContext
from molora_fed.corpus.blocks import Blocks
from molora_fed.models.base import Base
from molora_fed.models.frozen import stamp_model
from molora_fed.models.runtime import limit_threads
from molora_fed.testing.findings import CheckResult, examine, refuse_broken
from molora_fed.testing.models import (
    TINY_VOCABULARY,
    build_random_adapter,
    build_tiny_model,
    build_tiny_tokenizer,
)
from molora_fed.testing.targets import open_target, other_chance
from molora_fed.types import Split

__all__ = [
    "build_carried_context",
    "check_carried_files_conformance",
    "examine_carried_files",
]

_MAX_BYTES = 16 * 2**20


def build_carried_context(
    *,
    architecture: str = "llama",
    kind: str = "lora",
    seed: int = 0,
    blocks: int = 6,
    block_size: int = 32,
    max_bytes: int = _MAX_BYTES,
) -> CarriedContext:
    """What a carried file is computed from, made up: a tiny random base, an adapter, bytes of text.

    Args:
        architecture: One of `ARCHITECTURES`; 2 blocks, D = 32, vocabulary 257.
        kind: "lora" or "svd" for low-rank updates, "delta" for dense ones.
        seed: The context's.
        blocks: N, blocks of each split.
        block_size: T.
        max_bytes: Largest file.
    """
    model = build_tiny_model(architecture)
    base = Base(
        folder=Path("tiny"),
        model=model,
        tokenizer=build_tiny_tokenizer(),
        weights="0" * 64,
        tokenizer_fingerprint="0" * 64,
        config="0" * 64,
        files={},
        id=f"tiny-{architecture}",
        revision="",
        training=None,
    )
    return CarriedContext(
        base=base,
        adapter=build_random_adapter(model, kind=kind),
        rules=TrainingRules(rank=4, steps=4, batch=2, validate_every=2),
        seed=seed,
        max_bytes=max_bytes,
        samples={
            split: _make_up_blocks(split, number, blocks, block_size)
            for number, split in enumerate((Split.TRAIN, Split.VALIDATION))
        },
    )


def _make_up_blocks(split: Split, seed: int, count: int, size: int) -> Blocks:
    """Random bytes, two documents a block."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, TINY_VOCABULARY - 1, (count, size), dtype=np.int32)
    documents = np.arange(count * size, dtype=np.int32).reshape(count, size) // (size // 2)
    return Blocks("tiny", split, tokens, documents, documents)


def check_carried_files_conformance(target: Any, options: Any = None) -> None:
    """Check what computes a carried file against the whole contract.

    Args:
        target: The callable that is registered, or a class with options.
        options: Of a class; its defaults if None.

    Raises:
        PluginError: Naming every rule that is broken, with what was found.
    """
    name = getattr(target, "__name__", type(target).__name__)
    results = examine_carried_files(target, options)
    refuse_broken(f"Carried file '{name}'", results, page="docs/hooks/carried-files.md")


def examine_carried_files(target: Any, options: Any = None) -> tuple[CheckResult, ...]:
    """What `check_carried_files_conformance` finds, one result a check.

    Args:
        target: The callable that is registered, or a class with options.
        options: Of a class; its defaults if None.
    """
    return examine(_CHECKS, _Case(target, options))


@dataclass(frozen=True)
class _Case:
    target: Any
    options: Any

    def make(self, context: CarriedContext) -> Any:
        """What it gives, on one thread."""
        make = open_target(self.target, self.options)
        with limit_threads(1):
            return make(context)


def _gives_bounded_finite_tensors(case: _Case) -> str | None:
    context = build_carried_context()
    found = case.make(context)
    fault = find_carried_fault(found)
    if fault is None and len(encode_carried(found)) > context.max_bytes:
        fault = f"a file of at most {context.max_bytes:,} bytes", "a larger one"
    return None if fault is None else f"expected {fault[0]}, got {fault[1]}"


def _same_seed_gives_same_bytes(case: _Case) -> str | None:
    encoded = []
    for number in range(2):
        # Other states than any before: what draws from a global generator differs now.
        with other_chance(991 + number):
            encoded.append(encode_carried(case.make(build_carried_context())))
    if encoded[0] == encoded[1]:
        return None
    return (
        "expected the same bytes from the same seed (draw from generators of your own), got others"
    )


def _leaves_the_model_as_it_was(case: _Case) -> str | None:
    context = build_carried_context()
    model = context.base.model
    probe = torch.from_numpy(context.samples[Split.VALIDATION].tokens[:1]).long()
    before = stamp_model(model, probe), torch.is_grad_enabled()
    case.make(context)
    after = stamp_model(model, probe), torch.is_grad_enabled()
    changed = [part for part in before[0] if before[0][part] != after[0].get(part)]
    if before == after:
        return None
    got = f"changes of {', '.join(changed[:3])}" if changed else "another one"
    return f"expected the base's model as it was (weights, mode, gradients, outputs), got {got}"


def _leaves_the_adapter_as_it_was(case: _Case) -> str | None:
    context = build_carried_context()
    before = _copy_updates(context)
    case.make(context)
    after = _copy_updates(context)
    if before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items()):
        return None
    return "expected the adapter as it was (change copies: `.clone()`), got another one"


def _copy_updates(context: CarriedContext) -> dict[str, Tensor]:
    return {
        f"{module}.{part}": tensor.clone()
        for module, update in context.adapter.updates.items()
        for part, tensor in update.tensors().items()
    }


def _takes_dense_adapters(case: _Case) -> str | None:
    return _describe_fault(case, build_carried_context(kind="delta"))


def _takes_other_architectures(case: _Case) -> str | None:
    return _describe_fault(case, build_carried_context(architecture="gpt2"))


def _describe_fault(case: _Case, context: CarriedContext) -> str | None:
    fault = find_carried_fault(case.make(context))
    return None if fault is None else f"expected {fault[0]}, got {fault[1]}"


_CHECKS = (
    _gives_bounded_finite_tensors,
    _same_seed_gives_same_bytes,
    _leaves_the_model_as_it_was,
    _leaves_the_adapter_as_it_was,
    _takes_dense_adapters,
    _takes_other_architectures,
)
