"""Which layer each tensor of a LoRA file belongs to, whatever wrapped the model that it is of.

By names and shapes alone, without torch. A key is `PATH.lora_A[.ADAPTER].weight`; PATH is a layer's
name with whatever PEFT, compilers, sharding and vision models put around it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from molora_fed.adapters.headers import CONFIG_FILE, TensorHeader, describe_unreadable
from molora_fed.adapters.peft_config import LoraSettings, compile_names, list_endings
from molora_fed.adapters.peft_keys import Factor, KeptTensor, check_orientation, read_keys
from molora_fed.errors import AdapterError, IncompatibleAdapterError

__all__ = [
    "BaseLayers",
    "FactorPair",
    "LoraLayout",
    "list_missing_targets",
    "resolve_layout",
]

_OTHER_TOWERS = frozenset(
    {"vision", "visual", "image", "audio", "speech", "encoder", "draft", "critic", "reward", "mtp"}
)
_ZERO3 = (
    "Save it again with stage3_gather_16bit_weights_on_model_save, or run DeepSpeed's "
    "zero_to_fp32.py on the checkpoint."
)
_FSDP = (
    "Gather it where it was trained: save a full state dict "
    "(fsdp_state_dict_type FULL_STATE_DICT), with all processes running."
)


@dataclass(frozen=True)
class BaseLayers:
    """What of a base decides where tensors belong.

    Attributes:
        blocks: Full name of its list of decoder blocks, e.g. "model.layers".
        shapes: (D_out, D_in) of its linear layers by full name.
    """

    blocks: str
    shapes: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class FactorPair:
    """The two factors of one layer: their keys in the file and their sizes.

    Attributes:
        a: Key of A, (R, D_in).
        b: Key of B, (D_out, R).
        rank: R.
        alpha: Alpha by the config.
        trained_as: The module's name in the model that was trained, without wrappers.
        magnitude: Key of DoRA's magnitude, (D_out,); empty without.
    """

    a: str
    b: str
    rank: int
    alpha: float
    trained_as: str
    magnitude: str = ""

    def scale(self, use_rslora: bool) -> float:
        """Factor of the product: alpha / R, or alpha / sqrt(R)."""
        return self.alpha / (math.sqrt(self.rank) if use_rslora else self.rank)


@dataclass(frozen=True)
class LoraLayout:
    """What a LoRA file holds.

    Attributes:
        pairs: Factors by full module name, sorted.
        kept: Tensors that are no factors.
        notes: What was read as something else, for people.
        headers: Every tensor's header.
    """

    pairs: Mapping[str, FactorPair]
    kept: tuple[KeptTensor, ...]
    notes: tuple[str, ...]
    headers: Mapping[str, TensorHeader] = field(repr=False)


def resolve_layout(
    headers: Mapping[str, TensorHeader],
    settings: LoraSettings,
    name: str,
    *,
    base: BaseLayers | None = None,
    max_rank: int | None = None,
) -> LoraLayout:
    """Find the layer of each tensor, and hold ranks against the config.

    Args:
        headers: Every tensor's header.
        settings: The config.
        name: The adapter's name, for errors.
        base: The base's layers; with them a name is accepted under any prefix where exactly one
            way to read all names fits, without them PEFT's and known wrappers are taken off.
        max_rank: Largest rank, if a charter limits it.

    Raises:
        AdapterError: Naming what does not fit, what causes it and what repairs it.
        IncompatibleAdapterError: If names do not fit the base's layers.
    """
    _check_whole(headers, settings, name)
    factors, kept, notes = read_keys(headers, name)
    check_orientation(factors, headers, name)
    named, more = _name_layers(factors, name, base)
    notes += more
    grouped: dict[str, dict[str, str]] = {}
    raw: dict[str, str] = {}
    for factor, module in named.items():
        parts = grouped.setdefault(module, {})
        if factor.part in parts:
            raise describe_unreadable(
                name,
                expected="one way to read the names of its tensors",
                got=f"'{parts[factor.part]}' and '{factor.key}', both of '{module}'",
                fix="Save the adapter of the language model alone, once.",
            )
        parts[factor.part] = factor.key
        raw[module] = ".".join(factor.path)
    pairs = _pair(grouped, raw, headers, settings, name, base, max_rank)
    _check_targets(pairs, settings, name)
    return LoraLayout(dict(sorted(pairs.items())), tuple(kept), tuple(notes), headers)


def _check_whole(headers: Mapping[str, TensorHeader], settings: LoraSettings, name: str) -> None:
    """Refuse a file without numbers, as a sharded training leaves it."""
    empty = [key for key, header in headers.items() if 0 in header.shape]
    if headers and not empty:
        flat = [key for key, h in headers.items() if ".lora_" in key and len(h.shape) == 1]
        flat = [key for key in flat if key.rpartition(".")[0].endswith(("lora_A", "lora_B"))
                and key.endswith(".weight")]  # fmt: skip
        if flat:
            raise describe_unreadable(
                name,
                expected="factors of two dimensions",
                got=f"'{flat[0]}' of shape {headers[flat[0]].shape}: flattened by FSDP",
                fix=_FSDP,
            )
        return
    got = f"no tensor for {settings.shown_targets or 'any module'}"
    if empty:
        got = f"{len(empty)} empty tensors, e.g. '{empty[0]}' of shape {headers[empty[0]].shape}"
    raise describe_unreadable(
        name,
        expected="a pair lora_A (R, D_in), lora_B (D_out, R) for each changed module",
        got=f"{got}: saved under DeepSpeed ZeRO-3 without gathering",
        fix=_ZERO3,
    )


def _name_layers(
    factors: Sequence[Factor], name: str, base: BaseLayers | None
) -> tuple[dict[Factor, str], list[str]]:
    """Full module name of each factor, and what was done to the names."""
    plain = {factor: ".".join(factor.path) for factor in factors}
    if base is None or all(module in base.shapes for module in plain.values()):
        return plain, []
    listed = base.blocks.rpartition(".")[2]
    found: list[tuple[dict[Factor, str], str, str]] = []
    for infix in ("", "block", "layer"):
        named, prefixes, dropped = _try_reading(factors, base, listed, infix)
        if named is not None and len(prefixes) == 1 and len(dropped) <= 1:
            found.append((named, ".".join(prefixes.pop()), ".".join(dropped)))
            if not infix:
                break
    if len(found) == 1:
        named, prefix, infix = found[0]
        own = base.blocks.rpartition(".")[0]
        notes = [f"prefix '{prefix}' read as '{own}'"] if prefix != own else []
        notes += [f"wrapper '{infix}' in the keys taken off"] if infix else []
        return named, notes
    if len(found) > 1:
        raise describe_unreadable(
            name,
            expected="one way to read the names of its tensors",
            got=f"{len(found)} that fit the base, e.g. of '{factors[0].key}'",
            fix="Save the adapter from the model without wrappers.",
        )
    raise IncompatibleAdapterError(str(_describe_foreign(factors, name, base, listed)))


def _try_reading(
    factors: Sequence[Factor], base: BaseLayers, listed: str, infix: str
) -> tuple[dict[Factor, str] | None, set[tuple[str, ...]], set[str]]:
    """Read every name below its block, with one part left out if `infix` says where.

    Returns:
        Names by factor, or None if one does not fit; prefixes before the list of blocks; parts
        that were left out.
    """
    named: dict[Factor, str] = {}
    prefixes: set[tuple[str, ...]] = set()
    dropped: set[str] = set()
    for factor in factors:
        fits = []
        for place in range(len(factor.path) - 2):
            if factor.path[place] != listed or not factor.path[place + 1].isdecimal():
                continue
            inner = list(factor.path[place + 1 :])
            if infix:
                where = 1 if infix == "block" else len(inner) - 1
                if len(inner) < 3:
                    continue
                left = inner.pop(where)
                if left.isdecimal():
                    continue
                dropped.add(left)
            module = f"{base.blocks}.{'.'.join(inner)}"
            if module in base.shapes:
                fits.append((module, factor.path[:place]))
        if len(fits) != 1 or _find_tower(fits[0][1]):
            return None, prefixes, dropped
        named[factor] = fits[0][0]
        prefixes.add(fits[0][1])
    return named, prefixes, dropped


def _find_tower(path: Iterable[str]) -> str:
    """A part of a name that says that it is of another model than the language model; or ""."""
    return next((each for each in path if _OTHER_TOWERS & set(each.lower().split("_"))), "")


def _describe_foreign(
    factors: Sequence[Factor], name: str, base: BaseLayers, listed: str
) -> AdapterError:
    """Why names do not fit the base's layers."""
    towers = sorted({tower for f in factors if (tower := _find_tower(f.path))})
    whole = {".".join(factor.path) for factor in factors}
    own = ".".join
    if towers:
        return describe_unreadable(
            name,
            expected="factors of the language model alone",
            got=f"those of '{towers[0]}', too",
            fix="Train it again on the language layers alone (unsloth: "
            "finetune_vision_layers=False).",
        )
    outside = sorted(m for m in whole if f".{listed}." not in f".{m}.")
    if outside:
        return describe_unreadable(
            name,
            expected=f"factors of linear layers in the base's blocks '{base.blocks}'",
            got=f"those of '{outside[0]}', too: embedding and head stay the base's",
            fix=f"Train it again without {outside[0].rpartition('.')[2]} among target_modules.",
        )
    depth = 1 + max(int(n[len(base.blocks) + 1 :].partition(".")[0]) for n in base.shapes)
    unknown = next((f for f in factors if own(f.path) not in base.shapes), factors[0])
    if any("experts" in factor.path for factor in factors) and not any(
        ".experts." in module for module in base.shapes
    ):
        return describe_unreadable(
            name,
            expected="factors of layers that the base has one by one",
            got=f"'{unknown.key}', of an expert: transformers 5 fuses experts into one weight",
            fix="Train it again with target_modules that name attention and dense layers.",
        )
    return describe_unreadable(
        name,
        expected=f"names of the base's linear layers, e.g. '{next(iter(base.shapes))}', in "
        f"{depth} blocks",
        got=f"'{unknown.key}', which fits none, or fits more than one way",
        fix="It is of another architecture or size: train it on this base.",
    )


def _pair(
    grouped: Mapping[str, Mapping[str, str]],
    raw: Mapping[str, str],
    headers: Mapping[str, TensorHeader],
    settings: LoraSettings,
    name: str,
    base: BaseLayers | None,
    max_rank: int | None,
) -> dict[str, FactorPair]:
    """Put factors together, and hold their ranks against the config."""
    pairs: dict[str, FactorPair] = {}
    offenders: list[str] = []
    slices: Counter[int] = Counter()
    for module, parts in grouped.items():
        missing = {"lora_A", "lora_B"} - parts.keys()
        if missing:
            offenders.append(f"missing tensor '{module}.{min(missing)}.weight'")
            continue
        a, b = headers[parts["lora_A"]].shape, headers[parts["lora_B"]].shape
        rank = _agree(settings.ranks, module, raw[module], "rank_pattern", name)
        alpha = _agree(settings.alphas, module, raw[module], "alpha_pattern", name)
        found = (a[0], b[1])
        shape = None if base is None else base.shapes.get(module)
        if found != (rank, rank) or (shape is not None and (b[0], a[1]) != shape):
            slices[_guess_slices(a, b, rank, shape)] += 1
        if (a[1], b[0]) == (rank, rank) and found != (rank, rank):
            offenders.append(
                f"'{module}' of shapes {a} and {b}, which lie the other way round, as MLX's do"
            )
        elif found != (rank, rank):
            offenders.append(f"'{module}' of rank {found[0]} and {found[1]} instead of {rank}")
        elif max_rank is not None and rank > max_rank:
            offenders.append(f"'{module}' of rank {rank} above the charter's {max_rank}")
        magnitude = parts.get("lora_magnitude_vector", "")
        if magnitude and headers[magnitude].shape != b[:1]:
            shape_of = headers[magnitude].shape
            offenders.append(f"'{magnitude}' of shape {shape_of} instead of {b[:1]}")
        pairs[module] = FactorPair(
            parts["lora_A"],
            parts["lora_B"],
            a[0],
            alpha,
            raw[module],
            magnitude,
        )
    processes = next(iter(slices)) if len(slices) == 1 else 0
    if processes > 1 and slices[processes] == len(pairs) and len(pairs) == len(grouped):
        raise describe_unreadable(
            name,
            expected=f"whole factors of rank {settings.rank}",
            got=f"1/{processes} of each: the slice that one of {processes} processes held under "
            "FSDP",
            fix=_FSDP,
        )
    if offenders or not pairs:
        raise describe_unreadable(
            name,
            expected=f"a pair lora_A (R, D_in), lora_B (D_out, R) for each module '{CONFIG_FILE}' "
            "names, and nothing else",
            got="; ".join(offenders[:5]) or "no tensor",
            fix="Export the adapter again within these rules.",
        )
    return pairs


def _agree(patterns: object, module: str, raw: str, what: str, name: str) -> int:
    """A pattern's value of a module under the name it was trained by, and under the base's.

    Raises:
        AdapterError: If the two differ.
    """
    found = [patterns.find(each) for each in {module, raw}]  # type: ignore[attr-defined]
    if len(set(found)) > 1:
        raise describe_unreadable(
            name,
            expected=f"{what} that means one value",
            got=f"{found[0]} and {found[1]} for '{module}', trained as '{raw}'",
            fix=f"Write the base's names into {what} of {CONFIG_FILE}.",
        )
    return found[0]


def _guess_slices(
    a: Sequence[int], b: Sequence[int], rank: int, shape: tuple[int, int] | None
) -> int:
    """Of how many processes a factor pair may be the slice of one; 0 if it is no slice.

    FSDP cuts along the first dimension: A to (R / N, D_in), B to (D_out / N, R).
    """
    if b[1] != rank or a[0] >= rank or rank % a[0]:
        return 0
    count = rank // a[0]
    if shape is not None and (a[1] != shape[1] or b[0] * count != shape[0]):
        return 0
    return count


def _check_targets(pairs: Mapping[str, FactorPair], settings: LoraSettings, name: str) -> None:
    """Refuse factors that PEFT would leave out, by names or patterns of the config."""
    is_excluded = compile_names(settings.excluded, name, "exclude_modules")
    extra = [module for module, pair in pairs.items() if is_excluded(pair.trained_as)]
    if settings.listed is not None:
        is_target = compile_names(settings.listed, name, "target_modules")
        extra += [
            module
            for module, pair in pairs.items()
            if not (is_target(module) or is_target(pair.trained_as))
            or (settings.layers is not None and _find_block(module) not in settings.layers)
        ]
    else:
        extra += _list_unmatched(pairs, settings, name)
    if extra:
        raise describe_unreadable(
            name,
            expected=f"factors of the modules that '{CONFIG_FILE}' names",
            got=f"extra tensor '{pairs[extra[0]].a}', which PEFT would leave out",
            fix="Name the module among target_modules, or save the adapter again.",
        )


def _list_unmatched(
    pairs: Mapping[str, FactorPair], settings: LoraSettings, name: str
) -> list[str]:
    """Modules that a pattern of targets leaves out, although it matches others of the file.

    One that matches none was written for other names; one that is not read in linear time tells
    nothing. The tensors say then what was changed.
    """
    try:
        is_target = compile_names(settings.pattern, name, "target_modules")
    except AdapterError:
        return []
    matched = [m for m, pair in pairs.items() if is_target(m) or is_target(pair.trained_as)]
    return sorted(pairs.keys() - set(matched)) if matched else []


def _find_block(module: str) -> int | None:
    """The first number in a module's name, which PEFT takes for its block."""
    return next((int(each) for each in module.split(".") if each.isdecimal()), None)


def list_missing_targets(layout: LoraLayout, settings: LoraSettings) -> list[str]:
    """Names that the config lists as changed and that no factor belongs to."""
    names = [n for module, pair in layout.pairs.items() for n in (module, pair.trained_as)]
    named = {ending for each in names for ending in list_endings(each)}
    return sorted(target for target in settings.targets or () if target not in named)
