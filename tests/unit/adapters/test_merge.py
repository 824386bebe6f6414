from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.updates import Adapter, LinearUpdate, average_adapters
from molora_fed.errors import AdapterError, IncompatibleAdapterError
from molora_fed.testing.models import build_random_adapter


def test_average_is_of_products_not_of_factors(model):
    adapters = [build_random_adapter(model, rank=4, seed=seed) for seed in (1, 2, 3)]
    merged = average_adapters(adapters)
    for name, update in merged.updates.items():
        parts = [adapter.updates[name] for adapter in adapters]
        expected = torch.stack([part.product() for part in parts]).mean(dim=0)
        assert torch.allclose(update.product(), expected, atol=1e-6), name
        factors = parts[0].scale * (
            torch.stack([p.b for p in parts]).mean(0) @ torch.stack([p.a for p in parts]).mean(0)
        )
        assert not torch.allclose(update.product(), factors, atol=1e-3), name


def test_average_on_logits_is_the_mean_of_the_weights(model, tokens, logits):
    adapters = [
        build_random_adapter(model, kind=kind, rank=rank, seed=rank)
        for kind, rank in (("lora", 2), ("svd", 5), ("delta", 1))
    ]
    weights = [0.2, 0.5, 0.3]
    base = {n: p.clone() for n, p in model.named_parameters()}
    mean = {n: torch.zeros_like(p) for n, p in base.items()}
    for adapter, weight in zip(adapters, weights, strict=True):
        with applied(model, adapter):
            for name, parameter in model.named_parameters():
                mean[name] += weight * (parameter - base[name])
    with applied(model, average_adapters(adapters, weights)):
        found = logits(model, tokens)
    for name, parameter in model.named_parameters():
        parameter.copy_(base[name] + mean[name])
    assert torch.allclose(found, logits(model, tokens), atol=1e-5)


def test_one_adapter_is_itself(model):
    adapter = build_random_adapter(model, kind="delta")
    merged = average_adapters([adapter])
    for name, update in merged.updates.items():
        assert torch.equal(update.product(), adapter.updates[name].product())
        if update.bias is not None:
            assert torch.equal(update.bias, adapter.updates[name].bias)


def test_order_does_not_matter_to_the_bit(model):
    adapters = [build_random_adapter(model, rank=2, seed=seed) for seed in range(4)]
    weights = [0.1, 0.2, 0.3, 0.4]
    one = average_adapters(adapters, weights)
    other = average_adapters(adapters[::-1], weights[::-1])
    assert one.hash == other.hash
    assert all(torch.equal(u.dense, other.updates[n].dense) for n, u in one.updates.items())
    assert average_adapters(adapters, weights[::-1]).hash != one.hash


def test_a_module_an_adapter_leaves_alone_counts_as_zero(model):
    both = build_random_adapter(model, seed=1)
    later = build_random_adapter(model, seed=2, frozen_depth=1)
    merged = average_adapters([both, later])
    assert merged.frozen_depth == 0
    for name in both.updates.keys() - later.updates.keys():
        half = both.updates[name].product() / 2
        assert torch.allclose(merged.updates[name].product(), half)


def adapter_of(update, hash_="0"):
    return Adapter(
        name="x", kind="lora", frozen_depth=0, updates={"m": update}, hash=hash_, num_bytes=0
    )


@settings(deadline=None, max_examples=50)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    seed=st.integers(0, 9999),
)
def test_mixed_ranks_average_like_products(shape, ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    adapters = [
        adapter_of(
            LinearUpdate(
                a=torch.randn(rank, shape[1], generator=generator),
                b=torch.randn(shape[0], rank, generator=generator),
                scale=1 / rank,
            ),
            str(index),
        )
        for index, rank in enumerate(ranks)
    ]
    expected = torch.stack([a.updates["m"].product() for a in adapters]).mean(0)
    found = average_adapters(adapters).updates["m"].product()
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "weights"),
    [(0, None), (2, [1.0]), (2, [0.5, 0.4]), (2, [float("nan"), 1.0]), (2, [2.0, -0.5])],
)
def test_refuses_weights_that_do_not_fit(tiny_model, count, weights):
    adapters = [build_random_adapter(tiny_model(), seed=seed) for seed in range(count)]
    with pytest.raises(AdapterError, match="Cannot average adapters"):
        average_adapters(adapters, weights)


def test_refuses_adapters_of_different_bases(tiny_model):
    one, other = (build_random_adapter(tiny_model(), seed=s, name=f"a{s}") for s in (1, 2))
    with pytest.raises(IncompatibleAdapterError, match=r"'a1' on 1111.*'a2' on 2222"):
        average_adapters(
            [replace(one, base_weights="1" * 64), replace(other, base_weights="2" * 64)]
        )
    shape = adapter_of(LinearUpdate(dense=torch.zeros(2, 3)))
    with pytest.raises(IncompatibleAdapterError, match=r"expected shape \(2, 3\)"):
        average_adapters([shape, adapter_of(LinearUpdate(dense=torch.zeros(3, 3)))])
