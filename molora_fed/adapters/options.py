"""Options of the adapter kinds that the core registers, and how a kind is opened with its own."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from molora_fed.adapters.compatibility import matches_target
from molora_fed.adapters.layout import adaptable_modules, block_index, decoder_blocks
from molora_fed.errors import AdapterError
from molora_fed.plugins import Plugins

if TYPE_CHECKING:
    from molora_fed.adapters.contract import AdapterKind

__all__ = [
    "LinearOptions",
    "NoOptions",
    "Precision",
    "SvdOptions",
    "choose_modules",
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
    try:
        return options_type.model_validate(dict(options or {}))
    except ValidationError as error:
        offenders = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()
        )
        known = ", ".join(options_type.model_fields) or "none"
        raise AdapterError(
            f"Cannot use options of kind '{kind}': expected valid values among the keys {known}, "
            f"got {offenders[:300]}. Correct or remove these."
        ) from error


def open_kind(name: str, options: Mapping[str, Any] | None, plugins: Plugins) -> "AdapterKind":
    """Find a registered kind and give it its options.

    Raises:
        UnknownNameError: If no plugin registers the kind.
        AdapterError: If it refuses the options.
    """
    target = plugins.adapter_kinds.resolve(name)
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
