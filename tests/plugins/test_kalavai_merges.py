"""The registered merges act on the product B@A, repeat themselves, and fit what they came from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from molora_kalavai.merges import DareMerge, DareOptions, TiesOptions

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.save import save_adapter
from molora_fed.adapters.updates import Adapter, LinearUpdate, average_adapters
from molora_fed.errors import AdapterError, CharterError
from molora_fed.plugins import load_plugins
from molora_fed.storage.options import open_callable
from molora_fed.testing.models import build_random_adapter

MERGES = ("average", "dare", "dare-ties", "ties")


@pytest.fixture(scope="module")
def merges():
    registry = load_plugins().merges
    return {name: open_callable(registry, name) for name in MERGES}


def dense(values, hash_):
    update = LinearUpdate(dense=torch.tensor(values))
    return Adapter(
        name=hash_, kind="delta", frozen_depth=0, updates={"m": update}, hash=hash_, num_bytes=0
    )


def ties_by_hand(products):
    """The rule of arXiv 2306.01708 written again, one weight at a time."""
    kept = []
    for product in products:
        count = int(TiesOptions().density * product.numel())
        least = product.abs().flatten().sort(descending=True).values[count - 1]
        kept.append(torch.where(product.abs() >= least, product, 0.0))
    merged = torch.zeros_like(products[0])
    for place in range(merged.numel()):
        values = [float(k.flatten()[place]) for k in kept]
        sign = 1.0 if sum(values) >= 0 else -1.0
        agreeing = [v for v in values if v * sign > 0]
        merged.view(-1)[place] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return merged


def test_ties_is_the_papers_rule_on_products(merges, tiny_model):
    adapters = [build_random_adapter(tiny_model(), rank=2, seed=seed) for seed in (1, 2, 3)]
    merged = merges["ties"](adapters, name="ties", seed=0)
    for name, update in list(merged.updates.items())[:3]:
        expected = ties_by_hand([adapter.updates[name].product() for adapter in adapters])
        assert torch.allclose(update.product(), expected, atol=1e-6), name


def test_dare_keeps_the_mean_and_zeroes_the_rest():
    adapters = [dense([[1.0] * 2000], "a"), dense([[3.0] * 2000], "b")]
    options = DareOptions()
    merged = DareMerge(options)(adapters, name="dare", seed=1).updates["m"].product()
    assert merged.mean() == pytest.approx(2.0, abs=0.1)
    possible = {sum / options.density for sum in (0.0, 0.5, 1.5, 2.0)}
    assert set(merged.unique().tolist()) == possible


@pytest.mark.parametrize("name", MERGES)
def test_order_and_the_state_of_the_generator_do_not_matter(merges, tiny_model, name):
    model = tiny_model()
    adapters = [build_random_adapter(model, rank=2, seed=seed) for seed in range(3)]
    one = merges[name](adapters, name="x", seed=5)
    torch.rand(3)
    before = torch.random.get_rng_state()
    other = merges[name](adapters[::-1], name="x", seed=5)
    assert torch.equal(before, torch.random.get_rng_state())
    assert one.hash == other.hash
    for module, update in one.updates.items():
        assert torch.equal(update.product(), other.updates[module].product()), module


def test_a_seed_changes_what_is_drawn_and_nothing_else(merges, tiny_model):
    adapters = [build_random_adapter(tiny_model(), rank=2, seed=seed) for seed in range(2)]
    for name in MERGES:
        one, other = (merges[name](adapters, name=name, seed=seed) for seed in (1, 2))
        draws = name.startswith("dare")
        assert (one.hash != other.hash) == draws
        assert draws == any(
            not torch.equal(u.product(), other.updates[m].product()) for m, u in one.updates.items()
        )


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_of_mixed_kinds_fits_the_base_and_survives_the_disk(
    merges, tiny_model, tmp_path, name
):
    model = tiny_model()
    adapters = [
        build_random_adapter(model, kind="lora", rank=2, seed=1),
        build_random_adapter(model, kind="delta", seed=2, frozen_depth=1),
    ]
    merged = merges[name](adapters, name=name, seed=0)
    save_adapter(merged, model, tmp_path / "merged")
    read = load_adapter(tmp_path / "merged")
    with applied(model, read):
        for module, update in merged.updates.items():
            assert torch.equal(read.updates[module].product(), update.product()), module


@pytest.mark.parametrize("name", MERGES)
def test_no_adapter_is_refused(merges, name):
    with pytest.raises(AdapterError, match="at least one"):
        merges[name]([], name=name, seed=0)


@settings(deadline=None, max_examples=40)
@given(
    values=st.lists(
        st.lists(st.floats(-2, 2, width=32), min_size=10, max_size=10), min_size=1, max_size=4
    )
)
def test_ties_of_equal_adapters_is_the_trimmed_adapter_and_never_beyond_the_largest(values):
    merge = open_callable(load_plugins().merges, "ties")
    adapters = [dense([row], str(index)) for index, row in enumerate(values)]
    merged = merge(adapters, name="x", seed=0).updates["m"].product()
    largest = torch.stack([a.updates["m"].product().abs() for a in adapters]).amax(dim=0)
    assert bool((merged.abs() <= largest + 1e-6).all())
    alone = merge(adapters[:1], name="x", seed=0).updates["m"].product()
    twice = [adapters[0], dense([values[0]], "again")]
    assert torch.allclose(merge(twice, name="x", seed=0).updates["m"].product(), alone, atol=1e-6)


def test_average_is_the_core_function(merges, tiny_model):
    adapters = [build_random_adapter(tiny_model(), seed=seed) for seed in (1, 2)]
    assert merges["average"](adapters, name="x", seed=9).hash == average_adapters(adapters).hash


@pytest.mark.parametrize("name", ["ties", "dare", "dare-ties"])
def test_a_scale_multiplies_the_merge_and_changes_no_draw(name):
    registry = load_plugins().merges
    adapters = [dense([[1.0, -2.0, 3.0, 4.0]], "a"), dense([[2.0, 1.0, -1.0, 5.0]], "b")]
    whole, half = (
        open_callable(registry, name, {"density": 0.5, "scale": scale})(adapters, name=name, seed=3)
        for scale in (1.0, 0.5)
    )
    assert torch.equal(half.updates["m"].product(), 0.5 * whole.updates["m"].product())
    assert half.hash != whole.hash


@pytest.mark.parametrize("settings", [{"density": 0.0}, {"density": 1.1}, {"scale": 0.0}])
def test_options_out_of_range_are_refused(settings):
    with pytest.raises(CharterError, match=r"density, scale, got (density|scale)"):
        open_callable(load_plugins().merges, "dare", settings)
