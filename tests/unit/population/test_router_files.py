import json

import pytest
import torch
from adaptation_helpers import build_router
from safetensors.torch import load, save

from molora_fed.errors import PopulationError, UnknownNameError
from molora_fed.models.base import load_base
from molora_fed.plugins import load_plugins
from molora_fed.population import router_files
from molora_fed.population.router_files import load_router, open_router, save_router
from molora_fed.testing import build_synthetic_view

PLUGINS = load_plugins()
NAME = "parallel-sigmoid"


@pytest.fixture
def router():
    built = build_router(num_slots=4, width=8, seed=2, hot=3.0)
    built.set_progress(0.6)
    return built


@pytest.fixture
def path(router, tmp_path):
    save_router(router, NAME, tmp_path / "router.safetensors")
    return tmp_path / "router.safetensors"


def rewrite(path, card=None, **tensors):
    """Change what the file says."""
    found = load(path.read_bytes())
    old = {"format_version": 1, "name": NAME, "options": {"hot": 3.0}, "num_slots": 4, "width": 8}
    path.write_bytes(
        save({**found, **tensors}, metadata={"router": json.dumps({**old, **(card or {})})})
    )


def test_a_router_is_read_back_and_writes_the_same_bytes(router, path, tmp_path):
    loaded = load_router(path, PLUGINS)
    view = build_synthetic_view()
    assert torch.equal(loaded(view), router(view)) and loaded.options == router.options
    save_router(loaded, NAME, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("card", "named"),
    [
        ({"name": "nobody"}, "nobody"),
        ({"options": {"warm": 1}}, "warm"),
        ({"num_slots": 5}, r"'bias' \(4,\) float32 instead of \(5,\) float32"),
        ({"num_slots": 4096, "width": 2**17}, "got 4096 slots of width 131072"),
        ({"num_slots": 10**9}, "num_slots"),
        ({"code": "x"}, "code"),
    ],
)
def test_a_card_that_is_wrong_is_refused(path, card, named):
    rewrite(path, card)
    with pytest.raises(PopulationError, match=named):
        load_router(path, PLUGINS)


def test_tensors_that_are_wrong_are_refused(path):
    rewrite(path, bias=torch.full((4,), float("inf")))
    with pytest.raises(PopulationError, match="'bias' with NaN or infinity"):
        load_router(path, PLUGINS)
    rewrite(path, bias=torch.zeros(4), more=torch.zeros(1))
    with pytest.raises(PopulationError, match=r"'more' \(1,\) float32 instead of none"):
        load_router(path, PLUGINS)


def test_files_that_are_none_are_refused(path, monkeypatch):
    with pytest.raises(PopulationError, match="No such file"):
        load_router(path.with_name("other"), PLUGINS)
    monkeypatch.setattr(router_files, "MAX_ROUTER_BYTES", 100)
    with pytest.raises(PopulationError, match="at most 100 bytes"):
        load_router(path, PLUGINS)
    path.write_bytes(b"x" * 50)
    with pytest.raises(PopulationError, match="wrote, got"):
        load_router(path, PLUGINS)


def test_a_router_is_opened_by_name_for_a_base(tiny_checkpoint):
    base = load_base(tiny_checkpoint())
    opened = open_router(NAME, {"floor": 0}, base=base, num_slots=2, seed=1, plugins=PLUGINS)
    assert (opened.num_slots, opened.width, opened.options.floor) == (2, 32, 0)
    more = {"base": base, "seed": 1, "plugins": PLUGINS}
    with pytest.raises(PopulationError, match=r"floor.*Correct the router's options"):
        open_router(NAME, {"floor": 2}, num_slots=2, **more)
    with pytest.raises(PopulationError, match="one slot at least, got 0"):
        open_router(NAME, {}, num_slots=0, **more)
    with pytest.raises(UnknownNameError):
        open_router("nobody", {}, num_slots=2, **more)
