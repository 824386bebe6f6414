"""What an adapter kind is: its options, how a specialist is trained, written and read back."""

import abc
import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from molora_fed.adapters.headers import AdapterMeta
from molora_fed.adapters.limits import NO_BASE, BaseWeights
from molora_fed.adapters.peft_config import matches_target
from molora_fed.adapters.updates import Adapter
from molora_fed.charter import AdapterRules
from molora_fed.errors import AdapterError
from molora_fed.guard import guarded
from molora_fed.models.layout import adaptable_modules, block_index, decoder_blocks
from molora_fed.models.runtime import check_memory
from molora_fed.plugins import Plugins
from molora_fed.storage.settings import check_options

__all__ = [
    "AdapterKind",
    "LinearOptions",
    "NoOptions",
    "Precision",
    "SvdOptions",
    "check_rank",
    "choose_modules",
    "compute_difference",
    "copy_sharing",
    "open_kind",
    "read_options",
]


Precision = Literal["float32", "bfloat16", "int8", "int4", "int2"]
_ATTENTION = ("attn", "attention")


class NoOptions(BaseModel):
    """Of a kind that has none: every key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LinearOptions(NoOptions):
    """Options of `lora`, `svd` and `delta`.

    Attributes:
        targets: "all-linear", "attention" (linear layers inside a block's attention), or names or
            name endings as PEFT matches them, e.g. ["query_key_value"].
        precision: How numbers are written. Training is float32 always; "int8", "int4" and
            "int2" take the quantised format, which plain PEFT does not read.
        group: Numbers that share a scale in the quantised format.
    """

    targets: Literal["all-linear", "attention"] | tuple[str, ...] = "all-linear"
    precision: Precision = "float32"
    group: int = Field(default=64, ge=8, le=65536)


class SvdOptions(LinearOptions):
    """Options of `svd`.

    Attributes:
        budget_bytes: Largest weights file: ranks are then chosen by layer, at most R each, so that
            the product keeps as much of the difference as fits (by squared Frobenius norm).
            None gives every layer rank R.
    """

    budget_bytes: int | None = Field(default=None, ge=1)


def read_options(
    options_type: type[BaseModel], options: Mapping[str, Any] | None, kind: str
) -> Any:
    """Check a kind's options.

    Args:
        options_type: The kind's `Options`.
        options: What a charter or a caller says; None or empty takes all defaults.
        kind: The kind's name, for errors.

    Raises:
        AdapterError: If a key is unknown or a value out of range.
    """
    what, fix = f"Cannot use options of kind '{kind}'", "Correct or remove these."
    return check_options(options_type, options, what=what, error=AdapterError, fix=fix)


def open_kind(name: str, options: Mapping[str, Any] | None, plugins: Plugins) -> "AdapterKind":
    """Find a registered kind and give it its options.

    Raises:
        UnknownNameError: If no plugin registers the kind.
        AdapterError: If it refuses the options.
    """
    target = plugins.adapter_kinds.resolve(name)
    # Wrong options are a contributor's mistake, not the plugin's.
    with guarded(plugins.adapter_kinds.entry(name), "construction", passing=(AdapterError,)):
        kind: AdapterKind = target(dict(options)) if options else target()
    return kind


def choose_modules(
    model: Any, frozen_depth: int, targets: str | tuple[str, ...] = "all-linear"
) -> dict[str, nn.Module]:
    """The linear layers that a kind trains.

    Args:
        model: A transformers causal language model.
        frozen_depth: K; the first K blocks are left out.
        targets: See `LinearOptions`.

    Returns:
        Modules by full name, in the model's order.

    Raises:
        AdapterError: If nothing is left, or a name matches no layer.
        BaseCheckpointError: See `adaptable_modules`.
    """
    modules = adaptable_modules(model, frozen_depth)
    if targets == "all-linear":
        return modules
    if targets == "attention":
        prefix, _ = decoder_blocks(model)
        chosen = {n: m for n, m in modules.items() if _is_attention(n, prefix)}
        unmatched = [] if chosen else ["attention"]
    else:
        chosen = {n: m for n, m in modules.items() if matches_target(n, tuple(targets))}
        unmatched = [t for t in targets if not any(matches_target(n, (t,)) for n in modules)]
    if unmatched or not chosen:
        endings = sorted({name.rpartition(".")[2] for name in modules})
        raise AdapterError(
            f"Cannot adapt base '{type(model).__name__}': expected targets among its linear "
            f"layers {', '.join(endings)}, got {', '.join(unmatched) or 'none'}. "
            "Name layers of this base."
        )
    return chosen


def _is_attention(name: str, prefix: str) -> bool:
    """Whether a part of the name below its block speaks of attention."""
    index = block_index(name, prefix)
    inner = name.removeprefix(f"{prefix}.{index}.").split(".")
    return any(word in part for part in inner for word in _ATTENTION)


_TRAINED_BYTES = 16
"""Of a number that is trained, at least: itself, its gradient and AdamW's moments in float32."""


def copy_sharing(model: Any, own: Iterable[nn.Parameter]) -> Any:
    """Copy a model for training; parameters outside `own` share memory with the original, frozen.

    Args:
        model: The base model, which stays as it is.
        own: Its parameters that the copy has for itself, free to be trained.

    Raises:
        ComputeError: If there is no memory to train `own`.
    """
    kept = list(own)
    owned = {id(parameter) for parameter in kept}
    if kept:
        check_memory(
            _TRAINED_BYTES * sum(parameter.numel() for parameter in kept),
            kept[0].device,
            what="Cannot train whole linear layers",
            fix="Use the kind lora, fewer targets, or a machine with more memory.",
        )
    # A new Parameter around the same memory: freezing it must not touch the base's flags.
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
        for parameter in model.parameters()
        if id(parameter) not in owned
    }
    shared = {id(parameter) for parameter in memo.values()}
    copied = copy.deepcopy(model, memo)
    for parameter in copied.parameters():
        parameter.requires_grad_(id(parameter) not in shared)
    return copied


def compute_difference(own: Tensor | None, base: Tensor | None) -> Tensor | None:
    """Trained minus base, float32 and of their shape; None where a module has no such tensor."""
    if own is None or base is None:
        return None
    return own.detach().float() - base.detach().float()


def check_rank(rank: int, rules: AdapterRules, kind: str) -> None:
    """Refuse a rank that admission would refuse, before hours of training.

    Raises:
        AdapterError: If it is below 1 or above the charter's largest.
    """
    if not 1 <= rank <= rules.max_rank:
        raise AdapterError(
            f"Cannot train kind '{kind}': expected a rank from 1 to {rules.max_rank}, "
            f"got {rank}. Choose another rank."
        )


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

    def describe(self, rules: AdapterRules, base_weights: str) -> AdapterMeta:
        """What `export` writes beside the numbers, in `molora_adapter.json`.

        Args:
            rules: The rules given to `prepare`.
            base_weights: Fingerprint of the base.
        """
        return AdapterMeta(
            kind=self.name, frozen_depth=rules.frozen_depth, base_weights=base_weights
        )

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

        The kind chooses the format: `write_factors`, `write_differences`, or tensors of its own
        with `write_adapter_folder`, all of them in `molora_fed.adapters`. `self.describe` gives
        what stands beside the numbers.

        Args:
            trained: The model `prepare` made, after training.
            base_model: The base model.
            folder: Target, replaced whole or not at all.
            rank: R of low-rank kinds.
            rules: The rules given to `prepare`.
            base_weights: Fingerprint of the base, written beside.

        Raises:
            StorageError: On I/O errors.
        """

    @abc.abstractmethod
    def load(
        self,
        folder: Path,
        limits: AdapterRules | None,
        *,
        name: str = "",
        base: BaseWeights = NO_BASE,
    ) -> Adapter:
        """Read what `export` wrote as changes of linear layers; safe on files from outside.

        The kind opened for this has its default options: the files say everything. The readers of
        the two formats are `load_factors` and `load_differences`; one of its own uses
        `load_tensors` and `build_loaded`.

        Args:
            folder: The adapter's folder.
            limits: Limits on rank and bytes, checked before anything is allocated.
            name: Name for errors; the folder's path by default.
            base: Weights of the base, one at a time, for files that hold scales of rows or columns,
                say; a dense difference (D_out, D_in) is made of these here.

        Raises:
            AdapterError: If the files are malformed, unsafe or beyond the limits, or need a base
                and there is none.
        """
