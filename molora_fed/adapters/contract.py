"""What an adapter kind is: how a specialist is trained, written and read back."""

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel
from torch import nn

from molora_fed.adapters.options import NoOptions, read_options
from molora_fed.adapters.updates import Adapter
from molora_fed.charter import AdapterRules

__all__ = ["AdapterKind"]

_NARROW = 128  # D of the built-in base


class AdapterKind(abc.ABC):
    """How one kind of adapter is trained, written and read; registered as a class.

    Attributes:
        name: The name it is registered under.
        Options: Pydantic model of its options, which refuses unknown keys; none by default.
        options: The options it was opened with.
        narrow_learning_rate: Peak of AdamW's rate on a base as narrow as the built-in one
            (D = 128), measured there.
        width_power: How fast the rate falls with the base's width.
        exports_checkpoints: Whether `export` takes any model of the base's architecture, so that a
            checkpoint that was fine-tuned elsewhere can be contributed as this kind.
    """

    name: ClassVar[str]
    narrow_learning_rate: ClassVar[float]
    width_power: ClassVar[float]
    exports_checkpoints: ClassVar[bool] = False
    Options: ClassVar[type[BaseModel]] = NoOptions

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        """Open the kind.

        Args:
            options: Options by name; none takes all defaults.

        Raises:
            AdapterError: If an option is unknown or out of range.
        """
        self.options: Any = read_options(self.Options, options, getattr(self, "name", "unnamed"))

    def suggest_learning_rate(self, hidden_size: int) -> float:
        """Peak of AdamW's rate where nobody chose one, for a base of width D.

        Own definition: `narrow_learning_rate * (128 / D) ** width_power`. Full updates with power
        2 come to 3.1e-5 at D = 1024, where KALAVAI used 2e-5; low-rank factors bear about ten
        times that, power 1. Only D = 128 was measured.
        """
        return self.narrow_learning_rate * (_NARROW / hidden_size) ** self.width_power

    @abc.abstractmethod
    def prepare(
        self, model: Any, rules: AdapterRules, rank: int, *, seed: int = 0
    ) -> tuple[Any, list[nn.Parameter]]:
        """Make a model that can be trained, beside the base, which stays as it is.

        Frozen weights are shared with the base, trained ones are its own: do not run it while an
        adapter is `applied` to the base.

        Args:
            model: The base model.
            rules: The charter's rules; the frozen depth and the largest rank count here.
            rank: R of low-rank kinds.
            seed: Seed of random initial factors.

        Returns:
            The model to train, and its trained parameters in a fixed order. Before the first step
            its logits are the base's.

        Raises:
            AdapterError: If rank or frozen depth are against rules or base.
        """

    @abc.abstractmethod
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
        """Write what was trained as an adapter; equal weights give equal bytes.

        Args:
            trained: The model `prepare` made, after training.
            base_model: The base model.
            folder: Target, replaced whole or not at all.
            rank: R of low-rank kinds.
            rules: The rules given to `prepare`.
            base_weights: Fingerprint of the base, written beside.

        Raises:
            StorageError: If the disk refuses.
        """

    @abc.abstractmethod
    def load(self, folder: Path, limits: AdapterRules | None, *, name: str = "") -> Adapter:
        """Read what `export` wrote; safe on files from outside.

        Args:
            folder: The adapter's folder.
            limits: Limits on rank and bytes, checked before anything is allocated.
            name: Name for errors; the folder's path by default.

        Raises:
            AdapterError: If the files are malformed, unsafe or beyond the limits.
        """
