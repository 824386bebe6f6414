"""What reading an adapter goes by: the charter's rules, and the base's sizes and weights."""

from functools import cached_property
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor

from molora_fed.adapters.peft_tensors import BaseLayers
from molora_fed.charter import AdapterRules
from molora_fed.errors import AdapterError
from molora_fed.models.layout import adaptable_modules, decoder_blocks, weight_of
from molora_fed.storage.untrusted import clean

__all__ = ["NO_BASE", "BaseLimits", "BaseWeights"]


_NO_RULES = AdapterRules(max_rank=2**31, max_bytes=2**62)
"""What a file's own size and the base's bound is enough."""


class BaseLimits(AdapterRules):
    """A charter's rules with the base that an adapter is for; readers take them as the rules.

    Attributes:
        layers: (D_out, D_in) of the base's linear layers by full name.
        blocks: Full name of the base's list of decoder blocks.
        model: The base model: whole weights in the file are compared with its own.
        tokenizer: The base's tokenizer, to name tokens in errors; None names their ids.
    """

    layers: dict[str, tuple[int, int]]
    blocks: str = ""
    model: Any = Field(default=None, repr=False, exclude=True)
    tokenizer: Any = Field(default=None, repr=False, exclude=True)

    @classmethod
    def of(cls, rules: AdapterRules | None, model: Any, tokenizer: Any = None) -> Self:
        """The rules with a base model's layers.

        Args:
            rules: The charter's; None for an adapter under no charter.
            model: The base model.
            tokenizer: The base's tokenizer, if there is one at hand.

        Raises:
            BaseCheckpointError: See `molora_fed.models.layout.adaptable_modules`.
        """
        layers = {}
        for name, module in adaptable_modules(model, 0).items():
            rows, columns = weight_of(module).shape
            layers[name] = (int(rows), int(columns))
        rules = _NO_RULES if rules is None else rules
        prefix, _ = decoder_blocks(model)
        return cls(
            **rules.model_dump(), layers=layers, blocks=prefix, model=model, tokenizer=tokenizer
        )

    @property
    def base_layers(self) -> BaseLayers:
        """What decides where a LoRA's tensors belong."""
        return BaseLayers(self.blocks, self.layers)

    def find_misfit(self, name: str, shape: tuple[int, int], rank: int | None) -> str | None:
        """Say why a layer's change does not fit the base, or None.

        Args:
            name: Full module name.
            shape: (D_out, D_in) of the change.
            rank: R; None if it is dense.
        """
        known = self.layers.get(name)
        if known is None:
            return f"'{name}', which is no linear layer of the base"
        if shape != known:
            return f"'{name}' of shape {shape} instead of {known}"
        if rank is not None and rank > min(known):
            return f"'{name}' of rank {rank} above its {min(known)} dimensions"
        return None


class BaseWeights:
    """The base's linear weights, for kinds whose files mean a change only beside the base's own.

    A weight is copied when it is asked for, and not kept.

    Args:
        model: The base model with no adapter applied; None where there is no base at hand.
    """

    def __init__(self, model: Any = None) -> None:
        self._model = model

    @cached_property
    def _layers(self) -> dict[str, Any]:
        return dict(adaptable_modules(self._model, 0))

    def read(self, module: str, *, name: str) -> Tensor:
        """The weight of a linear layer inside the decoder blocks.

        Args:
            module: Full module name, e.g. "model.layers.0.mlp.up_proj"; it may be from a file from
                outside.
            name: The adapter's name, for errors.

        Returns:
            (D_out, D_in) float32 on the CPU, a copy.

        Raises:
            AdapterError: If no base is at hand, or it has no such linear layer.
        """
        if self._model is None:
            raise AdapterError(
                f"Cannot read adapter '{name}': expected the base that it is for, whose weights "
                "its numbers multiply, got none. Name the base."
            )
        layer = self._layers.get(module)
        if layer is None:
            raise AdapterError(
                f"Cannot read adapter '{name}': expected changes of the base's linear layers, got "
                f"'{clean(module, 80)}'. Export it again from training on this base."
            )
        return weight_of(layer).detach().to("cpu", torch.float32, copy=True).contiguous()


NO_BASE = BaseWeights()
"""Where no base is at hand; kinds whose files say everything need none."""
