"""The examples of docs/populations.md are real: their code runs."""

import re
from pathlib import Path

import numpy as np

from molora_fed.corpus.blocks import Blocks
from molora_fed.models.base import load_base
from molora_fed.plugins import get_plugins
from molora_fed.population.lineage import read_lineage
from molora_fed.population.router_files import load_router
from molora_fed.testing import build_random_adapter
from molora_fed.types import Split

PAGE = (Path(__file__).parents[2] / "docs" / "populations.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_example_adaptation_and_lifecycle_run(tiny_checkpoint, tmp_path):
    base = load_base(tiny_checkpoint())
    tokens = np.random.default_rng(0).integers(0, 256, (6, 16)).astype(np.int32)
    owners = np.arange(6, dtype=np.int32)[:, None].repeat(16, axis=1)
    namespace = {
        "base": base,
        "adapters": [("one", "noise", build_random_adapter(base.model, rank=4))],
        "train_blocks": [Blocks("noise", Split.TRAIN, tokens, owners, owners)],
        "folder": tmp_path,
    }
    exec(compile(BLOCKS[0], "populations.md", "exec"), namespace)
    assert namespace["gates"].shape == (1, 4)
    assert load_router(tmp_path / "router.safetensors", get_plugins()).num_slots == 4
    exec(compile(BLOCKS[1], "populations.md", "exec"), namespace)
    assert len(read_lineage(tmp_path / "lineage.jsonl").lines) == 3


def test_the_page_has_every_registered_router_scope_and_operator():
    plugins = get_plugins()
    registries = (plugins.adapter_routers, plugins.fitness_scopes, plugins.lifecycle_operators)
    for registry in registries:
        assert all(f"| `{name}` |" in PAGE for name in registry.names())
