"""Banks and views of made-up numbers: what routers are tested on without any model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molora_fed.adapters.carried_files import CarriedFiles
from molora_fed.bank import Bank, CalibrationBank
from molora_fed.bank.adapters import make_up_adapters
from molora_fed.types import Reading

__all__ = [
    "ALL_READINGS",
    "build_synthetic_bank",
    "permute_experts",
    "take_blocks",
]


ALL_READINGS: frozenset[Reading] = frozenset(
    {"base_hidden", "prefix_hidden", "mean_hidden", "experts_hidden", "evidence"}
)


def build_synthetic_bank(
    kind: type[Bank] = CalibrationBank,
    *,
    num_experts: int = 3,
    blocks_per_domain: int = 8,
    block_size: int = 24,
    hidden_size: int = 16,
    seed: int = 0,
    readings: frozenset[Reading] = ALL_READINGS,
    carried: Mapping[str, Mapping[str, Mapping[str, Tensor]]] | None = None,
) -> Any:
    """Make up a bank in which expert e is good at domain e and hidden states tell domains apart.

    Its adapters (`make_up_adapters`) read most where the states of their expert's domain lie.

    Args:
        kind: CalibrationBank or HeldOutBank.
        num_experts: E, and the number of domains.
        blocks_per_domain: Blocks of each domain.
        block_size: T.
        hidden_size: D.
        seed: Of all numbers but the domains' directions, which are always the same.
        readings: Columns the bank has.
        carried: What experts' contributions carry, tensors by the expert's name, "expert-0" and so
            on, and by the registered name of what computed them; nothing if None.

    Returns:
        A bank of `kind` in memory, for the probability mixture.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = _draw_directions(num_experts, hidden_size)
    domain_of = torch.arange(num_experts).repeat_interleave(blocks_per_domain)
    shape = (len(domain_of), block_size)
    starts = torch.rand(shape, generator=generator) < 0.08
    starts[:, 0] = True
    cluster_of = (domain_of * 4 + torch.arange(len(domain_of)) % 4).numpy()
    is_own = domain_of[:, None, None] == torch.arange(num_experts)
    logprob = 0.8 * is_own - 3 - torch.rand((*shape, num_experts), generator=generator)
    logprob[:, 0] = 0.0
    base_logprob = -3.2 - torch.rand(shape, generator=generator)
    base_logprob[:, 0] = 0.0

    noise = torch.randn((num_experts + 2, *shape, hidden_size), generator=generator)
    base_hidden, prefix_hidden, *experts = directions[domain_of][:, None] + noise
    columns = {
        "base_hidden": base_hidden,
        "prefix_hidden": prefix_hidden,
        "mean_hidden": torch.stack(experts).mean(0),
        "experts_hidden": tuple(experts),
    }
    names = tuple(f"expert-{index}" for index in range(num_experts))
    return kind(
        tokens=torch.randint(0, 50, shape, generator=generator, dtype=torch.int32),
        document_starts=starts,
        clusters=np.broadcast_to(cluster_of[:, None], shape),
        domains=tuple(f"domain-{index}" for index in range(num_experts)),
        domain_of=domain_of.numpy(),
        expert_names=names,
        has_base_expert=False,
        adapters=make_up_adapters(names, hidden_size, directions),
        base_logprob=base_logprob,
        logprob=logprob,
        hidden_size=hidden_size,
        readings=readings,
        carried={
            expert: CarriedFiles({name: partial(_copy, t) for name, t in files.items()})
            for expert, files in (carried or {}).items()
        },
        **{name: column for name, column in columns.items() if name in readings},
    )


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _draw_directions(num_domains: int, hidden_size: int) -> Tensor:
    """Where each domain's hidden states lie, the same for every seed: (domains, D)."""
    generator = torch.Generator().manual_seed(num_domains)
    return torch.randn(num_domains, hidden_size, generator=generator)


def permute_experts(bank: Bank, order: list[int]) -> Any:
    """The same bank with its experts in another order; expert i is the old `order[i]`."""
    experts = bank.experts_hidden
    names = tuple(bank.expert_names[index] for index in order)
    return replace(
        bank,
        expert_names=names,
        adapters=bank.adapters.take(names),
        logprob=bank.logprob[..., order],
        experts_hidden=None if experts is None else tuple(experts[index] for index in order),
        _derived={},
    )


def take_blocks(bank: Bank, rows: Sequence[int] | NDArray[np.int64]) -> Any:
    """The bank of some of the blocks, in this order, as one member of several would have it.

    Args:
        bank: Any bank.
        rows: Indices of its blocks, one at least.

    Returns:
        A bank of the same kind in memory; its domains are those of the blocks.
    """
    index = torch.tensor(list(rows))
    kept, domain_of = np.unique(bank.domain_of[index.numpy()], return_inverse=True)
    columns: dict[str, Any] = {
        name: None if column is None else column[index]
        for name in ("base_hidden", "prefix_hidden", "mean_hidden")
        for column in (getattr(bank, name),)
    }
    experts = bank.experts_hidden
    return replace(
        bank,
        tokens=bank.tokens[index],
        document_starts=bank.document_starts[index],
        clusters=bank.clusters[index.numpy()],
        domains=tuple(bank.domains[domain] for domain in kept),
        domain_of=domain_of.astype(np.int64),
        base_logprob=bank.base_logprob[index],
        logprob=bank.logprob[index],
        experts_hidden=None if experts is None else tuple(column[index] for column in experts),
        folder=None,
        measure=None,
        _derived={},
        **columns,
    )
