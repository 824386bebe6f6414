"""Fused models on tiny bases, saved and opened for export; what plain tools make of the files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import quiet
from molora_kalavai.uniform import UniformRouter
from peft import PeftModel
from transformers import AutoModelForCausalLM

from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.save import save_adapter
from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.export.subject import Subject, open_subject
from molora_fed.models.base import load_base
from molora_fed.routing.bundle import save_fused
from molora_fed.routing.fused import FusedExpert, FusedModel


@pytest.fixture
def save_model(tmp_path) -> Callable[..., Path]:
    """`save_model(checkpoint, {name: Adapter or its folder})`: a fused model's folder."""

    def save(checkpoint: Path, parts: Mapping[str, Adapter | Path]) -> Path:
        base = load_base(checkpoint)
        folders: dict[str, Path] = {}
        for name, part in parts.items():
            if isinstance(part, Adapter):
                folders[name] = tmp_path / "parts" / name
                save_adapter(part, base.model, folders[name])
            else:
                folders[name] = part
        experts = [
            FusedExpert(name, load_adapter(folder, model=base.model, name=name), f"text-{name}")
            for name, folder in folders.items()
        ]
        experts.insert(0, FusedExpert("base", None))
        router = UniformRouter(len(experts))
        fused = FusedModel(base, tuple(experts), router, "uniform", "probability", 0)
        save_fused(fused, tmp_path / "coop" / "fused", adapters=folders)
        return tmp_path / "coop" / "fused"

    return save


@pytest.fixture
def open_model(save_model) -> Callable[..., Subject]:
    """`open_model(checkpoint, parts)`: what `save_model` saved, opened for export."""
    return lambda checkpoint, parts: open_subject(save_model(checkpoint, parts))


@pytest.fixture
def our_logits(tokens) -> Callable[..., torch.Tensor]:
    """`our_logits(subject, weights)`: logits of the base with the weighted changes, (B, T, V).

    The changes run beside the layers, with no product and no sum of weights.
    """

    def run(subject: Subject, weights: Mapping[str, float]) -> torch.Tensor:
        model: Any = subject.base.model
        hooks = []
        for each in subject.specialists:
            for name, update in each.adapter.updates.items():
                hook = build_hook(update, weights.get(each.name, 0.0))
                hooks.append(model.get_submodule(name).register_forward_hook(hook))
        try:
            with torch.no_grad():
                return model(tokens).logits
        finally:
            for hook in hooks:
                hook.remove()

    return run


def build_hook(update: LinearUpdate, weight: float) -> Callable[..., torch.Tensor]:
    """A forward hook that adds a weighted change of a linear layer to what it gives."""

    def add(_module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        if update.a is None:
            change = args[0] @ update.dense.T
        else:
            change = update.scale * (args[0] @ update.a.float().T @ update.b.float().T)
        if update.bias is not None:
            change = change + update.bias
        return output + weight * change

    return add


@pytest.fixture
def peft_logits(tokens) -> Callable[..., torch.Tensor]:
    """`peft_logits(checkpoint, folder)`: what plain PEFT makes of a folder, (B, T, V)."""

    def run(checkpoint: Path, folder: Path) -> torch.Tensor:
        with quiet(), torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
            return PeftModel.from_pretrained(model, folder).eval()(tokens).logits

    return run


@pytest.fixture
def plain_logits(tokens) -> Callable[[Path], torch.Tensor]:
    """`plain_logits(checkpoint)`: what plain transformers makes of a checkpoint, (B, T, V)."""

    def run(checkpoint: Path) -> torch.Tensor:
        with quiet(), torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
            return model.eval()(tokens).logits

    return run
