from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.kinds import AdapterKind, DeltaKind, LoraKind, SvdKind
from molora_fed.adapters.updates import Adapter
from molora_fed.charter import AdapterRules

KINDS = {kind.name: kind for kind in (LoraKind, SvdKind, DeltaKind)}


@dataclass
class Trained:
    """An adapter after a few steps of training, and all it came from."""

    kind: AdapterKind
    base: Any
    model: Any
    folder: Path
    adapter: Adapter


@pytest.fixture(params=sorted(KINDS))
def kind(request) -> AdapterKind:
    return KINDS[request.param]()


@pytest.fixture
def train(tmp_path, tokens) -> Callable[..., Trained]:
    """`train(kind, base, frozen_depth=0, rank=4)`: three real steps, export, load."""

    def run(kind: AdapterKind, base: Any, *, frozen_depth: int = 0, rank: int = 4) -> Trained:
        rules = AdapterRules(frozen_depth=frozen_depth)
        model, parameters = kind.prepare(base, rules, rank, seed=3)
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for _ in range(3):
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        folder = tmp_path / f"{kind.name}-{rank}-{frozen_depth}"
        kind.export(model, base, folder, rank, rules)
        return Trained(kind, base, model.eval(), folder, load_adapter(folder, rules=rules))

    return run


@pytest.fixture
def logits() -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """`logits(model, tokens)`, (B, T, V), without gradients."""

    def run(model: Any, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(tokens).logits

    return run
