"""What reading an adapter may make of a file: the charter's rules, and the sizes of the base."""

from typing import Any, Self

from pydantic import Field

from molora_fed.adapters.peft_tensors import BaseLayers
from molora_fed.charter import AdapterRules
from molora_fed.models.layout import adaptable_modules, decoder_blocks, weight_of

__all__ = ["BaseLimits"]


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
