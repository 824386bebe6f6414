"""What reading an adapter may make of a file: the charter's rules, and the sizes of the base."""

from typing import Any, Self

from molora_fed.charter import AdapterRules
from molora_fed.models.layout import adaptable_modules, weight_of

__all__ = ["BaseLimits"]


class BaseLimits(AdapterRules):
    """A charter's rules with the base that an adapter is for; readers take them as the rules.

    Attributes:
        layers: (D_out, D_in) of the base's linear layers by full name.
    """

    layers: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, rules: AdapterRules, model: Any) -> Self:
        """The rules with a base model's layers.

        Args:
            rules: The charter's.
            model: The base model.

        Raises:
            BaseCheckpointError: See `molora_fed.models.layout.adaptable_modules`.
        """
        layers = {}
        for name, module in adaptable_modules(model, 0).items():
            rows, columns = weight_of(module).shape
            layers[name] = (int(rows), int(columns))
        return cls(**rules.model_dump(), layers=layers)

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
