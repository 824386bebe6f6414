"""The config of a base checkpoint: read within bounds, and what of it decides the function.

A config is read before anything is built from it: it may ask for more layers than any weights
hold, or for kernels that are fetched and run.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from molora_fed.errors import BaseCheckpointError
from molora_fed.models.base_files import load_json_file, quiet_transformers
from molora_fed.storage.files import canonical_json, hash_bytes
from molora_fed.storage.untrusted import clean

__all__ = ["check_size", "fingerprint_config", "read_config"]

MAX_CONFIG_BYTES = 4 * 2**20
MAX_LAYERS = 512
"""Layers of a base; the largest in use have below 200, and each takes milliseconds to build."""
MAX_NUMBER = 2**40
"""Largest integer in a config: sizes, positions and rotary bases stay far below."""

_LAYERS = re.compile(
    r"n(um)?_([a-z_]+_)?layers?|(en|de)coder_layers|(en|de)coder_num_layers|depths?"
)
_IMPLEMENTATION = re.compile(r"_?\w*_implementation(_internal)?")
_OWN_IMPLEMENTATIONS = ("eager", "sdpa", None)
# Of what every config has, the keys that decide the function; the others are for bookkeeping,
# outputs and classifiers. A key that a later version of transformers adds to every config is left
# out, too.
_DECIDING = frozenset({"architectures", "is_encoder_decoder", "model_type"})
_NEVER_DECIDING = frozenset({"use_cache", "dtype", "torch_dtype"})
_SPARE_NUMBERS = 2**26
"""Numbers of a model beside its weights: tables of rotary angles, masks."""


def read_config(stage: Path, tensors: int, what: str) -> Any:
    """Read a checkpoint's config, with the defaults of its architecture filled in.

    Args:
        stage: Folder with `config.json`; no code in it runs.
        tensors: Tensors of the weights: no fewer than layers.
        what: What failed, the start of a message.

    Raises:
        BaseCheckpointError: If it is missing, malformed, of an unknown architecture, or out of
            bounds.
    """
    raw = load_json_file(stage / "config.json", max_bytes=MAX_CONFIG_BYTES)
    layers = min(tensors, MAX_LAYERS)
    fault = next(_find_faults(raw, layers), None)
    if fault is not None:
        raise BaseCheckpointError(
            f"{what}: expected a config of at most {layers} layers (there are {tensors} tensors) "
            f"that names no kernels of others, got {clean(fault)}. Use another base."
        )
    with quiet_transformers():
        return AutoConfig.from_pretrained(
            str(stage), trust_remote_code=False, local_files_only=True
        )


def _find_faults(raw: Mapping[str, Any], layers: int) -> Iterator[str]:
    """What of a parsed config is out of bounds, whatever its architecture."""
    left: list[tuple[str, Any]] = list(raw.items())
    while left:
        key, value = left.pop()
        if isinstance(value, Mapping):
            left += value.items()
        elif isinstance(value, list):
            left += [(key, item) for item in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            limit = layers if _LAYERS.fullmatch(key) else MAX_NUMBER
            if value > limit and (isinstance(value, int) or limit == layers):
                yield f"{key} {clean(value, 40)}"
        elif _IMPLEMENTATION.fullmatch(key) and value not in _OWN_IMPLEMENTATIONS:
            yield f"{key} {clean(value, 80)}"


def check_size(config: Any, weights: Sequence[Path], what: str) -> int:
    """Refuse a config of a larger model than its weights can fill, before it takes memory.

    Args:
        config: From `read_config`.
        weights: The safetensors files.
        what: What failed, the start of a message.

    Returns:
        How many numbers the model holds.

    Raises:
        BaseCheckpointError: If it has more parameters than the weights have half bytes.
    """
    with torch.device("meta"), quiet_transformers():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    size = sum(path.stat().st_size for path in weights)
    if wanted > 2 * size + _SPARE_NUMBERS:
        raise BaseCheckpointError(
            f"{what}: expected weights of all parameters, got {size:,} bytes for {wanted:,} "
            "parameters that config.json asks for. Fetch it again."
        )
    return wanted


def fingerprint_config(config: Any) -> str:
    """SHA-256 over the canonical JSON of the keys that decide a model's function, lower-case hex.

    Defaults of the architecture are filled in; keys without a value, names, dtypes and what only
    concerns outputs are left out.

    Args:
        config: From `read_config`.
    """
    common = {*PreTrainedConfig().to_dict(), *_NEVER_DECIDING} - _DECIDING
    values = json.loads(config.to_json_string(use_diff=False))
    return hash_bytes(canonical_json(_keep_deciding(values, common)))


def _keep_deciding(value: Any, common: set[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: _keep_deciding(inner, common)
            for key, inner in value.items()
            if key not in common and inner is not None
        }
    if isinstance(value, list):
        return [_keep_deciding(inner, common) for inner in value]
    # JSON has no infinity, but configs of state-space models have.
    return repr(value) if isinstance(value, float) else value
