"""The package's own tests: the conformance kit, and what makes this check this check."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from molora_outlier.check import OutlierCheck, OutlierOptions
from molora_outlier.shape import measure_shape

from molora_fed.testing import (
    build_random_adapter,
    build_tiny_model,
    check_admission_check_conformance,
)

LIMITS = OutlierOptions(min_peers=2)


@pytest.fixture(scope="module")
def base():
    return SimpleNamespace(model=build_tiny_model("llama"))


def build(base, *, seed=0, kind="lora", strength=0.5):
    return build_random_adapter(base.model, kind=kind, seed=seed, rank=8, strength=strength)


def judge(base, adapter, peers=(), options=LIMITS):
    others = [SimpleNamespace(manifest=SimpleNamespace(kind="lora"), it=peer) for peer in peers]
    candidate = SimpleNamespace(
        adapter=adapter,
        base=base,
        contribution=SimpleNamespace(manifest=SimpleNamespace(kind="lora")),
        others=others,
        read_adapter=lambda other: other.it,
    )
    return OutlierCheck(options)(candidate)


def scale(adapter, factor, only=None):
    return replace(
        adapter,
        updates={
            name: replace(update, scale=update.scale * (factor if only in (None, name) else 1))
            for name, update in adapter.updates.items()
        },
    )


def test_keeps_the_contract():
    check_admission_check_conformance(OutlierCheck)
    check_admission_check_conformance(OutlierCheck, OutlierOptions(max_norm=10))


def test_its_numbers_are_those_of_the_product(base):
    adapter = build(base)
    shape = measure_shape(adapter, base)
    norms, shares = {}, []
    for name, update in adapter.updates.items():
        product = update.scale * update.b @ update.a
        weight = base.model.get_submodule(name).weight
        norms[name] = float(product.norm() / weight.norm())
        energy = torch.linalg.svdvals(product).square()
        shares.append(float(energy[0] / energy.sum()))
    assert shape.norm == pytest.approx(max(norms.values()), rel=1e-4)
    assert norms[shape.norm_module] == max(norms.values())
    assert min(shares) <= shape.share <= max(shares)


@pytest.mark.parametrize("kind", ["lora", "delta"])
def test_an_ordinary_adapter_passes_alone_and_among_its_like(base, kind):
    peers = [build(base, seed=seed) for seed in (1, 2, 3)]
    assert judge(base, build(base, kind=kind)) is None
    assert judge(base, build(base, kind=kind), peers) is None


def test_a_blown_up_adapter_a_blown_up_module_and_one_direction_are_each_named(base):
    honest = build(base)
    first = next(iter(honest.updates))
    found = judge(base, scale(honest, 10))
    assert (
        found.quarantine and "2 times a weight's norm" in found.expected and "5 in" in found.found
    )
    found = judge(base, scale(honest, 30, only=first), options=OutlierOptions(max_norm=100))
    assert "20 times the median" in found.expected and first in found.found
    flat = {name: replace(u, b=u.b[:, :1] @ torch.ones(1, 8)) for name, u in honest.updates.items()}
    assert "one direction" in judge(base, replace(honest, updates=flat)).expected


def test_among_its_like_it_is_held_to_their_size(base):
    peers = [build(base, seed=seed, strength=0.02) for seed in (1, 2)]
    found = judge(base, build(base), peers)
    assert "8 times the median of 2 admitted" in found.expected
    assert judge(base, build(base), peers[:1]) is None
