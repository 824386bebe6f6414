"""The files of a base checkpoint: which ones count, copying and downloading.

Only safetensors weights are ever read, and no code that comes with a checkpoint runs.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from molora_fed.errors import BaseCheckpointError, describe_mismatch
from molora_fed.storage.files import is_file, resolve_inside
from molora_fed.storage.untrusted import clean
from molora_fed.types import CONFIG_FILES, TOKENIZER_FILES, WEIGHTS_INDEX

__all__ = [
    "copy_checkpoint",
    "download_checkpoint",
    "find_file",
    "find_weight_files",
    "list_checkpoint_files",
    "load_json_file",
    "quiet_transformers",
    "stage_checkpoint",
]

MAX_JSON_BYTES = 64 * 2**20  # the largest tokenizer.json in use is below 40 MB
_WEIGHTS = "model.safetensors"
_WEIGHT_NAME = re.compile(r"\w[\w.-]{0,180}\.safetensors", re.ASCII)


def load_json_file(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Infinities and integers beyond 64 bits stand in files of well-known models.

    Args:
        path: The file.
        max_bytes: Largest file that is read.

    Raises:
        BaseCheckpointError: If it is missing, too large, or not a JSON object.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ValueError(f"{size} bytes")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError(type(value).__name__)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BaseCheckpointError(
            f"Cannot read base checkpoint '{path.parent}': expected a JSON object in "
            f"'{path.name}' of at most {max_bytes} bytes, got {clean(reason)}. "
            "Fetch the base again."
        ) from error
    return value


def find_file(folder: Path, name: str) -> Path | None:
    """A file of a checkpoint; None if there is none.

    Raises:
        BaseCheckpointError: If it is a link that leads out of the folder.
    """
    path = folder / name
    if resolve_inside(path, folder) is None:
        raise BaseCheckpointError(
            f"Cannot read base checkpoint '{folder}': expected files of its own, got '{name}', a "
            "link that leads out of the folder. Put the file itself there."
        )
    return path if is_file(path) else None


def find_weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted.

    Raises:
        BaseCheckpointError: If there are none, or the index names files outside the folder.
    """
    if find_file(folder, WEIGHTS_INDEX) is not None:
        names = load_json_file(folder / WEIGHTS_INDEX).get("weight_map")
        if (
            not isinstance(names, dict)
            or not names
            or not all(isinstance(n, str) and _WEIGHT_NAME.fullmatch(n) for n in names.values())
        ):
            raise BaseCheckpointError(
                f"Cannot read base checkpoint '{folder}': expected file names in "
                f"'{WEIGHTS_INDEX}', got something else. Fetch the base again."
            )
        found = sorted(set(names.values()))
        for name in found:
            find_file(folder, name)
        return [folder / name for name in found]
    if find_file(folder, _WEIGHTS) is not None:
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


def list_checkpoint_files(folder: Path) -> list[Path]:
    """The files that make up a checkpoint; whatever else lies beside them is no part of it.

    Raises:
        BaseCheckpointError: If there are no weights, a weight file is missing, or one of the files
            is a link that leads out of the folder.
    """
    weights = find_weight_files(folder)
    missing = [path.name for path in weights if not is_file(path)]
    if missing:
        raise BaseCheckpointError(
            f"Cannot read base checkpoint '{folder}': expected all files of its index, "
            f"got none of {', '.join(missing[:5])}. Fetch the base again."
        )
    names = [*CONFIG_FILES, *TOKENIZER_FILES, WEIGHTS_INDEX]
    return [*(folder / name for name in names if find_file(folder, name)), *weights]


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy the files that make up a checkpoint, and no others, byte by byte.

    Args:
        source: Checkpoint folder.
        target: Existing folder.

    Raises:
        BaseCheckpointError: As `list_checkpoint_files`.
        OSError: On I/O errors.
    """
    for path in list_checkpoint_files(source):
        shutil.copyfile(path, target / path.name)


@contextmanager
def stage_checkpoint(folder: Path) -> Iterator[Path]:
    """A folder that holds a checkpoint's files and nothing else, while the block runs.

    Libraries look for more than weights in the folder they load from: adapters, code, templates.

    Args:
        folder: Checkpoint folder.

    Raises:
        BaseCheckpointError: As `list_checkpoint_files`.
    """
    files = list_checkpoint_files(folder)
    with tempfile.TemporaryDirectory(prefix="molora-base-") as name:
        stage = Path(name)
        for path in files:
            (stage / path.name).symlink_to(path.resolve())
        yield stage


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

    patterns = [*CONFIG_FILES, *TOKENIZER_FILES, WEIGHTS_INDEX, "*.safetensors"]
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
