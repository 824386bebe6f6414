"""What bench/serve.py makes of its measurements, and that its sides do the same work.

The module lies in `bench/` beside those that it imports; it is imported from there.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from molora_fed.models.runtime import Placement
from molora_fed.testing.models import build_tiny_model

BENCH = Path(__file__).parents[3] / "bench"
SETTINGS = {
    "quick": True,
    "threads": 1,
    "cores": 2,
    "environment": {
        "device": "cpu", "hardware": "AVX2", "torch": "1", "transformers": "2", "peft": "3",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def bench():
    """The modules of the benchmark, by their last name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import serve
        import serve_limits
        import serve_page
        import serve_quality
        import serve_sides

        yield SimpleNamespace(
            serve=serve,
            limits=serve_limits,
            page=serve_page,
            quality=serve_quality,
            sides=serve_sides,
        )
    for name in [path.stem for path in BENCH.glob("serve*.py")]:
        sys.modules.pop(name)


def make_sides(bench, **tokens):
    """Sides of a cell whose tokens took these seconds, by round; all others a second."""
    named = {getattr(bench.sides, name): values for name, values in tokens.items()}
    rounds = len(next(iter(named.values())))
    return {
        side: {
            "token": named.get(side, [1.0] * rounds),
            "fastest": min(named.get(side, [1.0])),
            "prefill": [2.0] * rounds,
        }
        for side in bench.sides.SIDES
    }


def make_quality(bench, above):
    """A cell of quality in which every way lies so far above dense: mean, low and high."""
    ways = {way: {"loss": [2.0, 1.9, 2.1], "above_dense": above} for way in bench.quality.WAYS}
    rows = {"one domain, all": {**ways, "texts": 9}}
    return {"experts": 3, "router": "r", "dtype": "float32", "tokens": 128, "rows": rows}


def test_a_ratio_is_taken_within_each_round(bench):
    sides = make_sides(bench, DENSE=[2.0, 30.0, 4.0], OWN=[1.0, 20.0, 1.0])
    ratio = bench.page.compare(sides, bench.sides.DENSE, bench.sides.OWN, "token")
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((2.0, 1.6, 3.6))
    assert str(ratio) == "2.00x (1.60-3.60)"


def test_the_faster_base_is_the_reference(bench):
    slow = make_sides(bench, PLAIN=[1.0, 9.0, 1.0], OWN=[1.1, 1.1, 1.1])
    assert bench.page.find_base(slow) == bench.sides.PLAIN
    assert bench.page.find_base(make_sides(bench, OWN=[0.5])) == bench.sides.OWN


@pytest.mark.parametrize(
    ("low", "median", "high", "expected"),
    [(1.0, 1.2, 1.4, "yes"), (1.0, 1.3, 1.5, "in the median"), (1.0, 1.41, 1.5, "no")],
)
def test_a_bar_is_held_by_the_whole_spread(bench, low, median, high, expected):
    assert bench.page.judge(bench.page.Ratio(median, low, high), 1.4) == expected


def test_needs_of_a_token_by_hand(bench):
    shape = bench.limits.Shape(
        linear=((8, 4), (4, 8)), head=40, num_layers=2, query_width=4, key_width=2, number_bytes=2
    )
    base = bench.limits.count_need(shape, adapters=0, rows=1, adapted_rows=0, context=10)
    assert base.weight_bytes == 2 * (32 + 32 + 40)
    assert base.factor_bytes == 0
    assert base.cache_bytes == 2 * (2 * 2 * 2 * 10)  # keys and values of two layers
    assert base.operations == 2 * 104 + 4 * 2 * 4 * 10
    three = bench.limits.count_need(shape, adapters=2, rows=3, adapted_rows=2, context=10)
    factors = 16 * (12 + 12)
    assert three.factor_bytes == 2 * 2 * factors
    assert three.weight_bytes == base.weight_bytes
    assert three.cache_bytes == 3 * base.cache_bytes
    assert three.operations == 3 * base.operations + 2 * 2 * factors
    assert three.total_bytes == three.weight_bytes + three.factor_bytes + three.cache_bytes


def test_the_limit_is_the_longer_of_reading_and_multiplying(bench):
    need = bench.limits.Need(600, 300, 100, operations=4_000)
    assert need.limit(100.0, 1e9) == 10.0
    assert need.limit(1e9, 100.0) == 40.0


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama"])
def test_the_shape_of_a_model_has_all_its_products(bench, architecture):
    model = build_tiny_model(architecture)
    shape = bench.limits.read_shape(model)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    assert sum(a * b for a, b in shape.linear) + shape.head == sum(p.numel() for p in matrices)
    assert shape.number_bytes == 4
    assert shape.key_width == (16 if architecture == "llama" else 32)


@pytest.fixture(scope="module")
def workshop(bench):
    """Three experts of a base of the built-in one's size."""
    base = bench.sides.open_base("builtin", Placement(), Path())
    return bench.sides.Workshop(base, 3)


def test_all_that_mix_write_the_same_text(bench, workshop):
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(0, 2048, (2, 12), generator=generator)
    names = ("DENSE", "DRAWN", "MERGED", "IN_TURN", "ROWS")
    found = {
        name: workshop.make(getattr(bench.sides, name)).run(prompt, 5, sampled=False)
        for name in names
    }
    for name in names:
        assert torch.equal(found[name].text, found["DENSE"].text), name
        assert len(found[name].tokens) == 4
        assert min(found[name].prefill, *found[name].tokens) > 0


def test_a_sparse_text_keeps_an_adapter_and_not_the_base(bench, workshop):
    generator = torch.Generator().manual_seed(4)
    prompt = torch.randint(0, 2048, (4, 12), generator=generator)
    cache = bench.sides.GatedCache(workshop.fused)
    workshop.fused.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        pad_token_id=0,
        experts_per_text=1,
        past_key_values=cache,
    )
    assert cache.kept.flatten().tolist() == [1, 2, 1, 2]


def test_sampled_sides_are_timed_too(bench, workshop):
    prompt = torch.arange(12)[None]
    for name in (bench.sides.PLAIN, bench.sides.MERGED, bench.sides.DRAWN):
        assert workshop.make(name).run(prompt, 3, sampled=True).text.shape == (1, 3)


def test_spliced_texts_use_each_half_once(bench):
    texts = {
        name: torch.arange(6)[:, None] * 10 + torch.tensor([start, start, start + 5, start + 5])
        for name, start in (("a", 100), ("b", 200), ("c", 300))
    }
    spliced = bench.quality.splice_texts(texts)
    begins, ends = spliced[:, 0], spliced[:, 2]
    assert len(set(begins.tolist())) == len(set(ends.tolist())) == len(spliced) >= 15
    assert all(begin // 100 != end // 100 for begin, end in zip(begins, ends, strict=True))
    assert (spliced[:, 0] == spliced[:, 1]).all()


def test_an_interval_of_equal_values_has_no_width(bench):
    assert bench.quality.resample_mean(np.full(7, 0.5)) == (0.5, 0.5, 0.5)
    mean, low, high = bench.quality.resample_mean(np.arange(50.0))
    assert low < mean == 24.5 < high
    assert high - low == pytest.approx(2 * 1.96 * np.arange(50.0).std() / 50**0.5, rel=0.1)


def test_cells_are_chosen_by_whole_parts_of_their_names(bench):
    def choose(*values):
        return [c.name for c in bench.serve.choose_cells(bench.serve.parse_arguments(values))]

    assert not [name for name in choose() if name.startswith("quality")]
    assert choose("--cells", "quality", "--demo", "x") == ["quality/builtin"]
    assert choose("--cells", "quality", "--study", "x") == ["quality/smollm2"]
    assert choose("--cells", "speed/smollm2/float32/E4/B1") == ["speed/smollm2/float32/E4/B1"]
    assert len(choose("--cells", "memory/builtin/bfloat16/E1")) == 2
    assert len(set(choose())) == len(choose()) == 4 * (9 + 3 + 1 + 8)


def test_a_file_of_other_settings_is_not_gone_on_with(bench, tmp_path):
    path = tmp_path / "serve.json"
    assert bench.serve.read_kept(path, SETTINGS) == {}
    path.write_text(json.dumps({"settings": SETTINGS, "cells": {"quality/builtin": {}}}))
    assert bench.serve.read_kept(path, SETTINGS) == {"quality/builtin": {}}
    with pytest.raises(SystemExit, match=r"same threads, got \[2\]"):
        bench.serve.read_kept(path, {**SETTINGS, "threads": 2})


def test_the_page_tells_bars_limits_and_load(bench):
    sides = make_sides(bench, DENSE=[1.3, 1.36], SPARSE=[1.2, 1.26])
    speed = {"prompt": 128, "new": 8, "sides": sides, "load": 1.0}
    need = {"weight_bytes": 100, "factor_bytes": 0, "cache_bytes": 0, "operations": 1}
    rows = {name: {**need, "calls": 7} for name in sides}
    machine = {"bytes_per_second": 200.0, "operations_per_second": 1e9}
    cells = {
        "speed/smollm2/float32/E4/B1": speed,
        "limit/smollm2/float32/E4": {"machine": machine, "sides": rows, "load": 1.0},
        "quality/smollm2": make_quality(bench, above=[0.01, 0.005, 0.015]),
        "quality/builtin": make_quality(bench, above=[0.05, 0.04, 0.06]),
    }
    load = {
        "streams": 64,
        "serial": {"streams": 1, "tokens_per_second": 10.0, "errors": 0},
        "concurrent": {
            "streams": 64,
            "tokens_per_second": 90.0,
            "errors": 0,
            "first_token_seconds": {"median": 0.2, "p99": 0.5},
        },
    }
    page = bench.page.build_page({"settings": SETTINGS, "cells": cells}, load, None)
    dense = "| ours, dense, float32 | E4 | 1.33x (1.31-1.35) | 1.30x | 1.4x | yes | 1.00x | 38 % |"
    assert dense in page
    assert "| ours, sparse, float32 | E4 | 1.23x (1.21-1.25) | 1.20x | 1.1x | no |" in page
    assert "| ours, merged after the prompt, float32 | E4 | 1.00x (1.00-1.00) |" in page
    assert "| concurrent | 64 | 90.0 | 200 | 500 | 0 |" in page
    assert "## Memory" not in page
    first, other = page.split("## Loss of deciding once, ")[1:]
    assert first.startswith("SmolLM2-135M")
    assert "0.02 nats, held by one expert: yes, by merged: yes." in first
    assert "+0.0100 [+0.0050, +0.0150]" in first and "one expert: no, by merged: no." in other
    without = bench.page.build_page({"settings": SETTINGS, "cells": cells}, None, None)
    assert "Served" not in without
    figure = bench.page.draw_page({"settings": SETTINGS, "cells": cells})
    assert figure is not None and b"ours, dense" in figure
    assert bench.page.draw_page({"settings": SETTINGS, "cells": {}}) is None
