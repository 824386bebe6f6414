"""The files of a base checkpoint: which ones count, their fingerprints, copying and downloading.

Only safetensors weights are ever read, and no code that comes with a checkpoint runs.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from molora_fed.errors import BaseCheckpointError, describe_mismatch
from molora_fed.storage.files import canonical_json, hash_bytes, hash_file

__all__ = [
    "copy_checkpoint",
    "download_checkpoint",
    "find_weight_files",
    "fingerprint_tokenizer",
    "fingerprint_weights",
    "load_json_file",
    "quiet_transformers",
]

MAX_JSON_BYTES = 64 * 2**20  # the largest tokenizer.json in use is below 40 MB
_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_CONFIG_FILES = ("config.json", "generation_config.json")


def load_json_file(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Raises:
        BaseCheckpointError: If it is missing, too large, or not a JSON object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"{size} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(type(value).__name__)
    except (OSError, ValueError, RecursionError) as error:
        raise BaseCheckpointError(
            f"Cannot read base checkpoint '{path.parent}': expected a JSON object in "
            f"'{path.name}' of at most {MAX_JSON_BYTES} bytes, got {error}. Fetch the base again."
        ) from error
    return value


def find_weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted.

    Raises:
        BaseCheckpointError: If there are none, or the index names files outside the folder.
    """
    if (folder / _INDEX).is_file():
        names = load_json_file(folder / _INDEX).get("weight_map")
        if (
            not isinstance(names, dict)
            or not names
            or not all(isinstance(n, str) and Path(n).name == n for n in names.values())
        ):
            raise BaseCheckpointError(
                f"Cannot read base checkpoint '{folder}': expected file names in '{_INDEX}', "
                "got something else. Fetch the base again."
            )
        return [folder / name for name in sorted(set(names.values()))]
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    pickles = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
    got = ", ".join(pickles) or ("no weights" if folder.is_dir() else "no such folder")
    raise BaseCheckpointError(
        describe_mismatch(
            f"Cannot read base checkpoint '{folder}'",
            expected=f"a folder with {_WEIGHTS}",
            got=got,
            fix="Convert the weights to safetensors." if pickles else "Check the path.",
        )
    )


def fingerprint_weights(folder: Path) -> str:
    """SHA-256 over sorted tensor names, dtypes, shapes and bytes of a checkpoint's safetensors.

    How the tensors are spread over files does not matter.

    Args:
        folder: Checkpoint folder.

    Returns:
        Lower-case hex.

    Raises:
        BaseCheckpointError: If the weights are missing, malformed, or a name occurs twice.
    """
    places: dict[str, Path] = {}
    digest = hashlib.sha256()
    try:
        for path in find_weight_files(folder):
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
            twice = places.keys() & set(names)
            if twice:
                raise BaseCheckpointError(
                    f"Cannot read base checkpoint '{folder}': expected each tensor once, got "
                    f"'{min(twice)}' in two files. Fetch the base again."
                )
            places.update(dict.fromkeys(names, path))
        for piece in _tensor_pieces(places):
            digest.update(piece)
    except (SafetensorError, OSError) as error:
        raise BaseCheckpointError(
            f"Cannot read base checkpoint '{folder}': expected whole safetensors files, "
            f"got {error}. Fetch the base again."
        ) from error
    return digest.hexdigest()


def _tensor_pieces(places: dict[str, Path]) -> Iterator[bytes]:
    for name in sorted(places):
        with safe_open(places[name], framework="pt") as file:
            dtype = file.get_slice(name).get_dtype()
            tensor = file.get_tensor(name)
        yield canonical_json([name, str(dtype), list(tensor.shape)]) + b"\n"
        yield tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def fingerprint_tokenizer(folder: Path) -> str:
    """SHA-256 over the names and hashes of a checkpoint's tokenizer files, lower-case hex.

    Raises:
        BaseCheckpointError: If the folder holds no tokenizer.
    """
    hashes = {n: hash_file(folder / n) for n in _TOKENIZER_FILES if (folder / n).is_file()}
    if not hashes:
        raise BaseCheckpointError(
            f"Cannot read base checkpoint '{folder}': expected a tokenizer, got none of "
            f"{', '.join(_TOKENIZER_FILES)}. Save the tokenizer beside the weights."
        )
    return hash_bytes(canonical_json(hashes))


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy the files that make up a checkpoint, and no others, byte by byte.

    Args:
        source: Checkpoint folder.
        target: Existing folder.

    Raises:
        BaseCheckpointError: If the source has no weights or a weight file is missing.
        OSError: On I/O errors.
    """
    weights = find_weight_files(source)
    missing = [path.name for path in weights if not path.is_file()]
    if missing:
        raise BaseCheckpointError(
            f"Cannot copy base checkpoint '{source}': expected all files of its index, "
            f"got none of {', '.join(missing)}. Fetch the base again."
        )
    names = [*_CONFIG_FILES, *_TOKENIZER_FILES, _INDEX, *(path.name for path in weights)]
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def download_checkpoint(repository: str, revision: str) -> Path:
    """Download a checkpoint from the Hugging Face Hub into its own cache.

    Args:
        repository: E.g. "EleutherAI/pythia-410m".
        revision: Branch, tag or commit.

    Returns:
        Folder in the Hub's cache.

    Raises:
        BaseCheckpointError: If there is no such repository or revision, or no network.
    """
    from huggingface_hub import snapshot_download

    patterns = [*_CONFIG_FILES, *_TOKENIZER_FILES, _INDEX, "*.safetensors"]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the Hub's client raises its own, the network's and OS errors
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BaseCheckpointError(
            f"Cannot fetch base '{repository}@{revision}': expected it on the Hugging Face Hub, "
            f"got {type(error).__name__}: {reason} Check the name and the network, or pass a "
            "local folder."
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from drawing bars and printing reports; what is wrong, we say ourselves."""
    shown = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
