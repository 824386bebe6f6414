"""The kinds of adapter a contributor can train: `lora`, `svd` and `delta`.

Every kind changes the linear layers of blocks >= K and nothing else (`delta` their biases, too),
so that embedding, head, norms and the first K blocks stay the base's.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from molora_fed.adapters.budget import PackingCost, compress
from molora_fed.adapters.contract import (
    AdapterKind,
    LinearOptions,
    SvdOptions,
    check_rank,
    choose_modules,
    compute_difference,
    copy_sharing,
)
from molora_fed.adapters.limits import NO_BASE, BaseWeights
from molora_fed.adapters.save import (
    load_differences,
    load_factors,
    write_differences,
    write_factors,
)
from molora_fed.adapters.updates import Adapter, LinearUpdate, Spectrum, decompose
from molora_fed.charter import AdapterRules
from molora_fed.models.layout import bias_of, is_transposed, weight_of

__all__ = ["AdapterKind", "DeltaKind", "LoraKind", "SvdKind"]

_COSTS: Mapping[str, Callable[[int], PackingCost]] = {
    "float32": lambda _: PackingCost(32),
    "bfloat16": lambda _: PackingCost(16),
    "int8": lambda group: PackingCost(8, group),
    "int4": lambda group: PackingCost(4, group),
    "int2": lambda group: PackingCost(2, group),
}


class LoraKind(AdapterKind):
    """Low-rank factors trained directly (PEFT) on linear layers, scale alpha / sqrt(R).

    Source: arXiv 2106.09685; rsLoRA scale arXiv 2312.03732, eq. 5.
    """

    name = "lora"
    Options = LinearOptions
    options: LinearOptions
    narrow_learning_rate = 4e-3
    width_power = 1.0
    alpha: ClassVar[int] = 16

    def prepare(
        self, model: Any, rules: AdapterRules, rank: int, *, seed: int = 0
    ) -> tuple[Any, list[nn.Parameter]]:
        """Wrap a copy of the base that shares all weights; see `AdapterKind.prepare`."""
        check_rank(rank, rules, self.name)
        modules = choose_modules(model, rules.frozen_depth, self.options.targets)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=self.alpha,
            lora_dropout=0.0,  # a dropout would make the result depend on the device's generator
            use_rslora=True,
            target_modules=list(modules),
            fan_in_fan_out=_is_all_transposed(modules.values()),
        )
        with torch.random.fork_rng(), warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5 for an attribute by its old name.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            torch.manual_seed(seed)
            wrapped = get_peft_model(copy_sharing(model, ()), config)
        return wrapped, [p for p in wrapped.parameters() if p.requires_grad]

    def export(
        self,
        trained: Any,
        base_model: Any,
        folder: Path,
        rank: int,
        rules: AdapterRules,
        *,
        base_weights: str = "",
    ) -> None:
        """Write the factors in PEFT's format; see `AdapterKind.export`."""
        modules = choose_modules(base_model, rules.frozen_depth, self.options.targets)
        updates = {}
        for name in modules:
            layer = trained.base_model.model.get_submodule(name)
            updates[name] = LinearUpdate(
                a=layer.lora_A["default"].weight.detach(),
                b=layer.lora_B["default"].weight.detach(),
                scale=float(layer.scaling["default"]),
            )
        write_factors(
            folder,
            updates,
            self.describe(rules, base_weights),
            options=self.options,
            transposed=_is_all_transposed(modules.values()),
            use_rslora=True,
        )

    def load(
        self,
        folder: Path,
        limits: AdapterRules | None,
        *,
        name: str = "",
        base: BaseWeights = NO_BASE,
    ) -> Adapter:
        """Read a folder of PEFT's or the quantised format; see `AdapterKind.load`."""
        return load_factors(folder, limits, name or str(folder))


class SvdKind(AdapterKind):
    """Linear layers trained fully, shipped as the best rank-R approximation of the difference.

    Source: own definition; Eckart-Young theorem for "best".
    """

    name = "svd"
    exports_checkpoints = True
    Options = SvdOptions
    options: SvdOptions
    narrow_learning_rate = 2e-3
    width_power = 2.0

    def prepare(
        self, model: Any, rules: AdapterRules, rank: int, *, seed: int = 0
    ) -> tuple[Any, list[nn.Parameter]]:
        """Copy the base with its linear weights free; see `AdapterKind.prepare`."""
        check_rank(rank, rules, self.name)
        modules = choose_modules(model, rules.frozen_depth, self.options.targets)
        copied = copy_sharing(model, [m.weight for m in modules.values()])
        return copied, [p for p in copied.parameters() if p.requires_grad]

    def export(
        self,
        trained: Any,
        base_model: Any,
        folder: Path,
        rank: int,
        rules: AdapterRules,
        *,
        base_weights: str = "",
    ) -> None:
        """Write the truncated SVD in PEFT's format; see `AdapterKind.export`."""
        modules = choose_modules(base_model, rules.frozen_depth, self.options.targets)
        spectra = {
            name: decompose(
                compute_difference(weight_of(trained.get_submodule(name)), weight_of(module))
            )
            for name, module in modules.items()
        }
        write_factors(
            folder,
            self.shorten(spectra, rank),
            self.describe(rules, base_weights),
            options=self.options,
            transposed=_is_all_transposed(modules.values()),
        )

    def shorten(self, spectra: Mapping[str, Spectrum], rank: int) -> dict[str, LinearUpdate]:
        """Factors of differences within a rank and this kind's budget.

        Args:
            spectra: Differences by module name.
            rank: R, the largest of each.

        Raises:
            AdapterError: If the budget holds nothing.
        """
        options = self.options
        if options.budget_bytes is None:
            factors = {name: spectrum.factors(rank) for name, spectrum in spectra.items()}
            return {name: LinearUpdate(a=a, b=b) for name, (a, b) in factors.items()}
        cost = _COSTS[options.precision](options.group)
        return compress(spectra, rank=rank, budget_bytes=options.budget_bytes, cost=cost)

    def load(
        self,
        folder: Path,
        limits: AdapterRules | None,
        *,
        name: str = "",
        base: BaseWeights = NO_BASE,
    ) -> Adapter:
        """Read a folder of PEFT's or the quantised format; see `AdapterKind.load`."""
        return load_factors(folder, limits, name or str(folder))


class DeltaKind(AdapterKind):
    """Linear layers trained fully, weights and biases, shipped as the difference.

    Source: own definition.
    """

    name = "delta"
    exports_checkpoints = True
    Options = LinearOptions
    options: LinearOptions
    narrow_learning_rate = 2e-3
    width_power = 2.0

    def prepare(
        self, model: Any, rules: AdapterRules, rank: int, *, seed: int = 0
    ) -> tuple[Any, list[nn.Parameter]]:
        """Copy the base with its linear layers free; see `AdapterKind.prepare`."""
        modules = choose_modules(model, rules.frozen_depth, self.options.targets)
        own = [p for module in modules.values() for p in module.parameters()]
        copied = copy_sharing(model, own)
        return copied, [p for p in copied.parameters() if p.requires_grad]

    def export(
        self,
        trained: Any,
        base_model: Any,
        folder: Path,
        rank: int,
        rules: AdapterRules,
        *,
        base_weights: str = "",
    ) -> None:
        """Write the differences; see `AdapterKind.export`."""
        updates = {}
        for name, module in choose_modules(
            base_model, rules.frozen_depth, self.options.targets
        ).items():
            own = trained.get_submodule(name)
            updates[name] = LinearUpdate(
                dense=compute_difference(weight_of(own), weight_of(module)),
                bias=compute_difference(bias_of(own), bias_of(module)),
            )
        meta = self.describe(rules, base_weights)
        write_differences(folder, updates, meta, options=self.options)

    def load(
        self,
        folder: Path,
        limits: AdapterRules | None,
        *,
        name: str = "",
        base: BaseWeights = NO_BASE,
    ) -> Adapter:
        """Read a folder of differences, quantised or not; see `AdapterKind.load`."""
        return load_differences(folder, limits, name or str(folder))


def _is_all_transposed(modules: Iterable[nn.Module]) -> bool:
    """PEFT's `fan_in_fan_out`: one flag for all modules of an adapter."""
    return all(is_transposed(module) for module in modules)
