"""Two adapter kinds as a stranger would write them: scales of rows (IA3), and whole weights.

They import what `molora_fed`, `molora_fed.adapters` and `molora_fed.models.layout` hand out.
"""

from typing import ClassVar

import torch
from torch import nn

from molora_fed import hookimpl
from molora_fed.adapters import (
    CONFIG_FILE,
    NO_BASE,
    WEIGHTS_FILE,
    AdapterKind,
    LinearOptions,
    LinearUpdate,
    NoOptions,
    build_loaded,
    choose_modules,
    compute_difference,
    copy_sharing,
    describe_unreadable,
    load_differences,
    load_json,
    load_tensors,
    write_adapter_folder,
    write_differences,
)
from molora_fed.models.layout import weight_of


class RowScales(AdapterKind):
    """A factor for each output of a linear layer, beside its bias.

    Source: arXiv 2205.05638, IA3, on all linear layers.
    """

    name = "row-scales"
    Options: ClassVar = NoOptions
    narrow_learning_rate = 2e-2
    width_power = 0.0

    def prepare(self, model, rules, rank, *, seed=0):
        """A copy that shares all weights and has a vector (D_out,) beside each."""
        copied = copy_sharing(model, ())
        for module in choose_modules(copied, rules.frozen_depth).values():
            device = weight_of(module).device
            module.row_scale = nn.Parameter(torch.ones(len(weight_of(module)), device=device))
            module.register_forward_hook(_scale_rows)
        return copied, [p for n, p in copied.named_parameters() if n.endswith(".row_scale")]

    def export(self, trained, base_model, folder, rank, rules, *, base_weights=""):
        """One vector a layer, D_in times smaller than its difference."""
        names = list(choose_modules(base_model, rules.frozen_depth))
        scales = {f"{name}.scale": trained.get_submodule(name).row_scale for name in names}
        config = {"kind": self.name, "tensors": sorted(scales)}
        write_adapter_folder(folder, config, scales, self.describe(rules, base_weights))

    def load(self, folder, limits, *, name="", base=NO_BASE):
        """`(scale - 1) * W`, row by row."""
        name = name or str(folder)
        declared = load_json(folder / CONFIG_FILE, name).get("tensors")

        def check(headers):
            wrong = [key for key, header in headers.items() if len(header.shape) != 1]
            if declared != sorted(headers) or wrong:
                raise describe_unreadable(
                    name,
                    expected=f"the vectors that '{CONFIG_FILE}' lists",
                    got=", ".join(wrong) or "others",
                    fix="Export the adapter again.",
                )

        limit = None if limits is None else limits.max_bytes
        tensors = load_tensors(folder / WEIGHTS_FILE, name, max_bytes=limit, check=check)
        updates = {}
        for key, scale in tensors.items():
            module = key.removesuffix(".scale")
            weight = base.read(module, name=name)
            if len(weight) != len(scale):
                raise describe_unreadable(
                    name,
                    expected=f"{len(weight)} scales of '{module}'",
                    got=str(len(scale)),
                    fix="Train on the cooperative's base.",
                )
            updates[module] = LinearUpdate(dense=(scale.float() - 1)[:, None] * weight)
        return build_loaded(folder, updates, name)


def _scale_rows(module, inputs, output):
    """As it was, exactly, where all scales are 1."""
    product = output if module.bias is None else output - module.bias
    return output + (module.row_scale - 1) * product


class WholeWeights(AdapterKind):
    """Linear weights without their biases, trained fully and shipped as differences."""

    name = "whole-weights"
    Options: ClassVar = LinearOptions
    narrow_learning_rate = 2e-3
    width_power = 2.0

    def prepare(self, model, rules, rank, *, seed=0):
        """A copy with linear weights of its own."""
        modules = choose_modules(model, rules.frozen_depth, self.options.targets)
        copied = copy_sharing(model, [module.weight for module in modules.values()])
        return copied, [p for p in copied.parameters() if p.requires_grad]

    def export(self, trained, base_model, folder, rank, rules, *, base_weights=""):
        """Differences, in as many bits as the options say."""
        updates = {}
        modules = choose_modules(base_model, rules.frozen_depth, self.options.targets)
        for name, module in modules.items():
            own = weight_of(trained.get_submodule(name))
            updates[name] = LinearUpdate(dense=compute_difference(own, weight_of(module)))
        meta = self.describe(rules, base_weights)
        write_differences(folder, updates, meta, options=self.options)

    def load(self, folder, limits, *, name="", base=NO_BASE):
        """Differences say everything themselves."""
        return load_differences(folder, limits, name or str(folder))


@hookimpl
def register_adapter_kinds(register):
    """Register both."""
    for kind in (RowScales, WholeWeights):
        register(
            kind.name, kind, summary="A kind that tests are made with", source="own definition"
        )
