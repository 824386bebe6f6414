"""PEFT's `adapter_config.json`, judged by what it does: `scale * B @ A` on linear layers, or not.

A configuration is accepted if PEFT, given it, leaves the base's weights as they are and adds that
product; a key is refused only if its value does something else. Imports neither torch nor PEFT.
"""

import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import re2

from molora_fed.adapters.headers import CONFIG_FILE, describe_unreadable
from molora_fed.storage.untrusted import clean

__all__ = [
    "DEFAULTS",
    "LoraSettings",
    "NamePatterns",
    "compile_names",
    "list_endings",
    "matches_target",
    "read_settings",
]

Scalar = int | float
MERGE = (
    "Merge it into its base with PEFT's merge_and_unload(), and pass that checkpoint to `molora "
    "contribute --checkpoint`."
)

DEFAULTS: Mapping[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "bias": "none",
    "kasa_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "megatron_config": None,
    "modules_to_save": None,
    "monteclora_config": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
}
"""PEFT's own default of each key that makes it compute something else at another value."""

_ANY_VALUE = frozenset(
    {
        # What is read, and judged by itself:
        "alpha_pattern", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern",
        "target_modules", "task_type", "use_rslora",
        # How it was trained, or how PEFT holds it. Which modules are changed, the tensors say.
        "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules",
        "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform",
        "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision",
        "runtime_config",
        # Read by PEFT under the initialisation of that name only; `velora_config` in training only.
        "corda_config", "eva_config", "loftq_config", "lora_ga_config", "velora_config",
    }
)  # fmt: skip
# Those that leave the base as it is; the others subtract the first product from its weights.
_NEUTRAL_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
_RESTRICTING_KEYS = ("exclude_modules", "layers_pattern", "layers_to_transform")
_HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_MAX_TARGETS = 20_000
_PROMPTS = frozenset(
    {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT",
     "CPT", "CARTRIDGE"}
)  # fmt: skip


@dataclass(frozen=True)
class LoraSettings:
    """What a LoRA config says about scales and names.

    Attributes:
        rank: R of modules that no pattern names.
        alpha: Alpha of modules that no pattern names.
        ranks: R by module.
        alphas: Alpha by module.
        use_rslora: Whether the scale is alpha / sqrt(R) instead of alpha / R.
        targets: Names or name endings that the config lists as changed; None where it says so
            otherwise (a pattern, "all-linear"), or restricts them further.
        listed: Names or name endings that the config lists as changed, restricted or not; None
            where it does not list them.
        layers: Blocks that the config restricts the list to; None for all.
        pattern: Pattern of whole names that says what is changed; "" where it is none.
        excluded: Names or endings, or a pattern, that the config leaves out.
        shown_targets: What the config says of targets, for people.
        uses_dora: Whether a magnitude is trained beside: not a low-rank change.
        saved_modules: Further modules that the config says are trained whole.
        token_indices: Rows of the embedding that the config says are trained.
    """

    rank: int
    alpha: Scalar
    ranks: "NamePatterns"
    alphas: "NamePatterns"
    use_rslora: bool
    targets: tuple[str, ...] | None
    listed: tuple[str, ...] | None
    layers: frozenset[int] | None
    pattern: str
    excluded: tuple[str, ...] | str
    shown_targets: str
    uses_dora: bool = False
    saved_modules: tuple[str, ...] = ()
    token_indices: tuple[int, ...] = ()


def list_endings(name: str) -> Iterator[str]:
    """A module's full name, and every ending of it that begins after a dot, longest first."""
    yield name
    start = name.find(".") + 1
    while start:
        yield name[start:]
        start = name.find(".", start) + 1


def matches_target(name: str, targets: Collection[str]) -> bool:
    """Whether a module is named by full names or endings, as PEFT matches them.

    Args:
        name: Full module name.
        targets: A set, where there may be many: each ending is looked up in it once.
    """
    return any(ending in targets for ending in list_endings(name))


_PLAIN = re.compile(r"\^?[A-Za-z0-9_.]+")
_WORD = re.compile(r"\^?[A-Za-z0-9_]+")
_MAX_PATTERNS = 64
"""Keys of one pattern that are regular expressions."""
_MAX_PATTERN = 2_048  # characters of one
_PATTERN_MEMORY = 2**23  # bytes that one may take, compiled
# What both Python and RE2 take, and read otherwise.
_READ_OTHERWISE = re.compile(r"\{,|\[\[?[:.=]|\(\?[a-zA-Z]*[LuxaU]")


class NamePatterns:
    """PEFT's `rank_pattern` or `alpha_pattern`: the first key that names a module decides.

    A key is a regular expression that the end of a module's name has to match, from a dot or the
    start on. It is matched in linear time (RE2); what RE2 cannot express is refused. Where there
    are more keys than 64, as a tool writes them for every module, those that are names as such
    are looked up: a dot is a dot there.

    Args:
        pattern: Values by key, in the config's order.
        default: The value of modules that no key names.
        name: The adapter's name, for errors.
        what: Key of the config, for errors.

    Source: peft.utils.other.get_pattern_key.
    """

    def __init__(
        self, pattern: Mapping[str, Any], default: Any, *, name: str = "", what: str = "pattern"
    ) -> None:
        self._values = list(pattern.values())
        self._default = default
        self._places: dict[str, int] = {}
        self._patterns: list[tuple[int, Callable[[str], Any]]] = []
        is_name = _PLAIN if len(pattern) > _MAX_PATTERNS else _WORD
        complex_keys = [key for key in pattern if not is_name.fullmatch(key)]
        if len(complex_keys) > _MAX_PATTERNS:
            raise describe_unreadable(
                name,
                expected=f"at most {_MAX_PATTERNS} regular expressions in {what}",
                got=str(len(complex_keys)),
                fix="Write the modules' names out.",
            )
        for place, key in enumerate(pattern):
            if is_name.fullmatch(key):
                self._places.setdefault(key, place)
            else:
                self._patterns.append((place, _compile(key, name, what)))

    def find(self, module: str) -> Any:
        """The value of a module."""
        keys = (f"^{module}", *list_endings(module))
        places = [self._places[key] for key in keys if key in self._places]
        places += [place for place, matches in self._patterns if matches(module)]
        return self._values[min(places)] if places else self._default


def compile_names(found: Collection[str] | str, name: str, what: str) -> Callable[[str], bool]:
    """Whether a module is among names and endings, or matches a pattern of whole names.

    Raises:
        AdapterError: If a pattern cannot be matched in linear time.
    """
    if not isinstance(found, str):
        names = frozenset(found)
        return lambda module: matches_target(module, names)
    if not found:
        return lambda module: False
    matches = _compile(found, name, what, whole=True)
    return lambda module: bool(matches(module))


def _compile(key: str, name: str, what: str, *, whole: bool = False) -> Callable[[str], Any]:
    """One key as PEFT puts it together, for RE2.

    Args:
        key: The regular expression.
        name: The adapter's name, for errors.
        what: Key of the config, for errors.
        whole: Whether it has to match a whole name, not an ending of it.

    Raises:
        AdapterError: If Python or RE2 does not take it, or the two would read it differently.
    """
    text = rf"({key})$" if whole else rf"(.*\.)?({key})$"
    reason = ""
    if len(key) > _MAX_PATTERN:
        reason = f"more than {_MAX_PATTERN} characters"
    elif _READ_OTHERWISE.search(key):
        reason = "a form that programs read differently"
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                re.compile(text)
        except (re.error, RecursionError, OverflowError, Warning) as error:
            reason = f"no regular expression ({clean(error, 80)})"
    if not reason:
        options = re2.Options()
        options.max_mem = _PATTERN_MEMORY
        options.log_errors = False
        try:
            matches: Callable[[str], Any] = re2.compile(text, options).match
            return matches
        except re2.error as error:
            found = error.args[0] if error.args else "not supported"
            found = found.decode(errors="replace") if isinstance(found, bytes) else found
            reason = f"what cannot be matched in linear time ({clean(found, 80)})"
    raise describe_unreadable(
        name,
        expected=f"regular expressions without look-around and back-references in {what}",
        got=f"'{clean(key, 120)}': {reason}",
        fix=f"Write the modules' names out in {what} of {CONFIG_FILE}.",
    )


def read_settings(config: Mapping[str, Any], name: str) -> LoraSettings:
    """Judge a LoRA config from outside.

    Args:
        config: Content of `adapter_config.json`.
        name: The adapter's name, for errors.

    Raises:
        AdapterError: If PEFT would compute something else than `scale * B @ A` on linear layers;
            names the setting, and what to do.
    """
    _check_type(config, name)
    _check_effects(config, name)
    _check_initialisation(config, name)
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    patterns = [config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}]
    valid = isinstance(config.get("use_rslora", False), bool)
    valid = valid and all(isinstance(pattern, dict) for pattern in patterns)
    ranks = [rank, *patterns[0].values()] if valid else []
    alphas = [alpha, *patterns[1].values()] if valid else []
    valid = valid and all(_is_number(each) and 0 < each < 1e6 for each in ranks)
    valid = valid and all(_is_number(each) and 0 < abs(each) < 1e6 for each in alphas)
    if not valid:
        raise describe_unreadable(
            name,
            expected="positive ranks, alphas that are not zero, and patterns keyed by names",
            got=f"r {clean(config.get('r'), 40)}, "
            f"lora_alpha {clean(config.get('lora_alpha'), 40)}, "
            f"use_rslora {clean(config.get('use_rslora'), 40)}, "
            f"patterns {clean(patterns, 120)}",
            fix=f"Correct {CONFIG_FILE}.",
        )
    listed = _read_targets(config, name)
    restricted = any(config.get(key) not in (None, [], "") for key in _RESTRICTING_KEYS)
    shown = config.get("target_modules")
    return LoraSettings(
        rank=rank,
        alpha=alpha,
        ranks=NamePatterns(patterns[0], rank, name=name, what="rank_pattern"),
        alphas=NamePatterns(patterns[1], alpha, name=name, what="alpha_pattern"),
        use_rslora=config.get("use_rslora", False),
        targets=None if restricted else listed,
        listed=listed,
        layers=_read_layers(config.get("layers_to_transform")),
        pattern=shown if isinstance(shown, str) and shown.lower() != "all-linear" else "",
        excluded=_read_excluded(config.get("exclude_modules")),
        shown_targets=_shorten(shown),
        uses_dora=bool(config.get("use_dora")),
        saved_modules=_list_texts(config.get("modules_to_save")),
        token_indices=_list_indices(config.get("trainable_token_indices")),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shorten(targets: Any) -> str:
    """Targets for people: of full names the last part alone, each once."""
    if not isinstance(targets, list):
        return clean(targets) if targets is not None else ""
    return clean(", ".join(sorted({str(each).rpartition(".")[2] for each in targets})))


def _list_texts(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(clean(each, 80) for each in values[:20])


def _list_indices(value: Any) -> tuple[int, ...]:
    """Rows that `trainable_token_indices` names: a list, or lists by module."""
    lists = value.values() if isinstance(value, dict) else [value]
    found = [each for part in lists if isinstance(part, list) for each in part]
    return tuple(sorted({each for each in found if type(each) is int}))


def _read_targets(config: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    targets = config.get("target_modules")
    if targets is None or isinstance(targets, str):
        return None  # a pattern, or "all-linear": the tensors say which modules these were
    texts = isinstance(targets, list) and all(isinstance(t, str) and t for t in targets)
    if not texts or not targets:
        raise describe_unreadable(
            name,
            expected="target_modules as a list of module names, a pattern or null",
            got=clean(targets, 80),
            fix=f"Correct {CONFIG_FILE}.",
        )
    if len(targets) > _MAX_TARGETS:
        raise describe_unreadable(
            name,
            expected=f"at most {_MAX_TARGETS} target_modules",
            got=str(len(targets)),
            fix="Name endings instead of every module.",
        )
    return tuple(targets)


def _read_excluded(value: Any) -> tuple[str, ...] | str:
    """`exclude_modules`: a pattern, or names and endings."""
    if isinstance(value, str):
        return value
    return tuple(each for each in value if isinstance(each, str)) if isinstance(value, list) else ()


def _read_layers(value: Any) -> frozenset[int] | None:
    """Blocks of `layers_to_transform`; None for all, as PEFT takes an empty list."""
    found = [value] if type(value) is int else value if isinstance(value, list) else []
    return frozenset(each for each in found if type(each) is int) or None


def _check_type(config: Mapping[str, Any], name: str) -> None:
    """Refuse what is no LoRA, naming what it is."""
    found = config.get("peft_type")
    kind = found.upper() if isinstance(found, str) else None if found is None else "?"
    if kind == "LORA":
        return
    if kind is None and ("lora_parameters" in config or "fine_tune_type" in config):
        raise describe_unreadable(
            name,
            expected="a LoRA of PEFT",
            got="one of MLX, whose factors lie the other way round",
            fix="Merge it with `mlx_lm.fuse --model BASE --adapter-path FOLDER --save-path OUT`, "
            "and pass OUT to `molora contribute --checkpoint`.",
        )
    fix = "Train it again as a LoRA." if kind in _PROMPTS else MERGE
    if kind is None:
        fix = "Point to the folder of a LoRA that PEFT saved."
    raise describe_unreadable(
        name,
        expected="peft_type 'LORA'",
        got=f"peft_type {clean(found, 80)!r}" if kind is not None else "no peft_type",
        fix=fix,
    )


_CAUSES: Mapping[str, tuple[str, str]] = {
    "alora_invocation_tokens": (
        "an activated LoRA, which changes the tokens after its invocation only",
        "Train it again without alora_invocation_tokens.",
    ),
    "layer_replication": ("a model with repeated layers", "Train it again without it."),
    "lora_bias": ("a bias on lora_B", MERGE),
    "target_parameters": (
        "factors of fused expert weights, which are no linear layers",
        "Train it again with target_modules that name linear layers.",
    ),
    "use_qalora": ("inputs that are pooled by QALoRA", "Train it again without use_qalora."),
}


def _check_effects(config: Mapping[str, Any], name: str) -> None:
    """Refuse keys whose value changes what is computed.

    Judged by the tensors, not here: DoRA's magnitudes, biases, whole modules and embedding rows.
    """
    by_tensors = {"use_dora", "bias", "modules_to_save", "trainable_token_indices"}
    offenders = []
    for key in sorted(config.keys() - _ANY_VALUE - by_tensors):
        value = config[key]
        if value and value != DEFAULTS.get(key):
            offenders.append((key, f"{clean(key, 40)} {clean(value, 40)!r}"))
    if offenders:
        cause, fix = _CAUSES.get(offenders[0][0], ("", "Train it again without these."))
        raise describe_unreadable(
            name,
            expected="a plain LoRA config, which adds scale * B @ A and nothing else",
            got=", ".join(text for _, text in offenders[:5]) + (f": {cause}" if cause else ""),
            fix=fix,
        )
    task = config.get("task_type")
    if task in _HEAD_TASKS:
        raise describe_unreadable(
            name,
            expected="an adapter of a causal language model",
            got=f"task_type {clean(task, 40)!r}: trained under a classification head",
            fix="Train it again with task_type CAUSAL_LM.",
        )
    if config.get("bias", "none") not in ("none", "all", "lora_only", None):
        raise describe_unreadable(
            name, expected="bias 'none'", got=f"bias {clean(config['bias'], 40)!r}", fix=MERGE
        )


def _check_initialisation(config: Mapping[str, Any], name: str) -> None:
    """Refuse a LoRA whose initialisation took its first product out of the base's weights."""
    found = config.get("init_lora_weights", True)
    start = found.lower() if isinstance(found, str) else found
    if isinstance(start, bool | str | None) and start in _NEUTRAL_INITS:
        return
    shown = clean(found, 80)
    raise describe_unreadable(
        name,
        expected="init_lora_weights that leaves the base's weights as they are",
        got=f"init_lora_weights {shown!r}, which changes them before training",
        fix="Convert it where it was trained: model.save_pretrained(OUT, "
        "path_initial_model_for_weight_conversion=INITIAL), INITIAL being the adapter saved "
        "before training; the rank doubles.",
    )
