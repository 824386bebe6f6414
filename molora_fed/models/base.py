"""The base checkpoint: load, check, fetch, or make the built-in one."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from molora_fed.charter import BaseIdentity
from molora_fed.errors import BaseCheckpointError, ComputeError, describe_mismatch
from molora_fed.models.base_config import check_size, fingerprint_config, read_config
from molora_fed.models.base_files import (
    copy_checkpoint,
    download_checkpoint,
    find_file,
    find_weight_files,
    load_json_file,
    quiet_transformers,
    stage_checkpoint,
)
from molora_fed.models.fingerprints import (
    count_tensors,
    fingerprint_checkpoint,
    fingerprint_tensors,
    fingerprint_tokenizer,
    fingerprint_weights,
)
from molora_fed.models.gguf_files import GGUF_SUFFIX, convert_gguf
from molora_fed.models.head import find_head
from molora_fed.models.runtime import Placement, check_memory
from molora_fed.storage.files import hash_file, replace_folder, write_json
from molora_fed.storage.untrusted import clean
from molora_fed.types import Progress

__all__ = [
    "Base",
    "check_base",
    "copy_base",
    "fetch_base",
    "fingerprint_tokenizer",
    "fingerprint_weights",
    "load_base",
    "load_model",
    "read_card",
]


FORMAT_VERSION = 1
CARD_FILE = "base.json"
MAX_CARD_TENSORS = 4_096
"""Of a base whose card holds a hash of each, by which the first that differs is named."""
_SHOWN_PARTS = 4  # of what differs, in one message
_HUB_SOURCE = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)@(?P<revision>[\w./-]+)")


@dataclass(frozen=True, eq=False)
class Base:
    """A loaded base checkpoint.

    Attributes:
        folder: Where it lies.
        model: Hugging Face causal LM in eval mode, no parameter requiring gradients.
        tokenizer: Its tokenizer.
        weights: Fingerprint of the weights.
        tokenizer_fingerprint: Fingerprint of the tokenizer's files.
        config: Fingerprint of the effective config: what of it decides the function.
        files: SHA-256 of each file that the base is made of, by name.
        id: Name for people.
        revision: Revision for people.
        training: How the built-in base was trained: steps, tokens, validation loss by domain,
            settings, versions; None for any other.
    """

    folder: Path
    model: Any
    tokenizer: Any
    weights: str
    tokenizer_fingerprint: str
    config: str
    files: Mapping[str, str]
    id: str
    revision: str
    training: Mapping[str, Any] | None

    @property
    def hidden_size(self) -> int:
        """D, width of the hidden state that enters the output head."""
        return int(self.model.get_output_embeddings().weight.shape[1])

    @property
    def max_positions(self) -> int | None:
        """Tokens of the longest text it can read; None if its config sets no limit."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if limit is None else int(limit)

    def identity(self) -> BaseIdentity:
        """What bundles, and charters of version 1, say about it."""
        return BaseIdentity(
            id=self.id,
            revision=self.revision,
            weights=self.weights,
            tokenizer=self.tokenizer_fingerprint,
        )

    def whole_identity(self) -> BaseIdentity:
        """What a charter says about it: the effective config and the files, too."""
        more = {"config": self.config, "files": dict(self.files)}
        return self.identity().model_copy(update=more)

    def find_document_starts(self, tokens: Tensor) -> Tensor:
        """True at the first position and after every end-of-text token, (B, T) bool."""
        starts = torch.zeros_like(tokens, dtype=torch.bool)
        starts[:, 0] = True
        starts[:, 1:] = tokens[:, :-1] == self.tokenizer.eos_token_id
        return starts


def check_base(base: Base, identity: BaseIdentity) -> None:
    """Check that a base is the one a charter names, in everything that the charter names.

    Raises:
        BaseCheckpointError: If a fingerprint or a file differs; names expected and got.
    """
    pairs = {
        "weights": (identity.weights, base.weights),
        "tokenizer": (identity.tokenizer, base.tokenizer_fingerprint),
    }
    fix = "Fetch the cooperative's base."
    if identity.files:
        for name in sorted({*identity.files, *base.files}):
            pairs[name] = (identity.files.get(name, "none"), base.files.get(name, "none"))
        if all(one == other for one, other in pairs.values()):
            fix = (
                "The files are the same, but this version of transformers, "
                f"{transformers.__version__}, reads them otherwise: install the one that the "
                "cooperative was founded with."
            )
    if identity.config is not None:
        pairs["config"] = (identity.config, base.config)
    wrong = {part: pair for part, pair in pairs.items() if pair[0] != pair[1]}
    if wrong:
        raise BaseCheckpointError(
            describe_mismatch(
                f"Cannot use base '{base.folder}'",
                expected=f"{identity.id} with " + _list({p: e for p, (e, _) in wrong.items()}),
                got=_list({p: g for p, (_, g) in wrong.items()}),
                fix=fix,
            )
        )


def _list(fingerprints: Mapping[str, str]) -> str:
    shown = [f"{part} {value}" for part, value in fingerprints.items()]
    more = len(shown) - _SHOWN_PARTS
    return " and ".join(shown[:_SHOWN_PARTS]) + (f" and {more} more" if more > 0 else "")


def load_base(
    folder: Path, placement: Placement | None = None, progress: Progress | None = None
) -> Base:
    """Load a checkpoint from a folder: safetensors only, none of its own code.

    Args:
        folder: Hugging Face checkpoint with its tokenizer, optionally with `base.json`.
        placement: Device and dtype of the model in memory; the CPU and float32 if None.
            Fingerprints are over the files.
        progress: Told the megabytes read of all while fingerprints of a large base are computed.

    Raises:
        BaseCheckpointError: If anything is missing, malformed, needs code of its own, does not
            cover all of the model's parameters, or differs from what `base.json` says.
        ComputeError: If it is larger than the memory there is.
    """
    what = f"Cannot load base checkpoint '{folder}'"
    placement = placement or Placement()
    with stage_checkpoint(folder) as stage:
        settings, config = _read_fitting(stage, folder, placement)
        known = fingerprint_checkpoint(folder, progress)
        tokenizer_fingerprint = fingerprint_tokenizer(folder)
        model = _load_staged(stage, folder, settings, placement)
        with _loading(what, stage, folder), quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                str(stage), trust_remote_code=False, local_files_only=True
            )
            tokenizer.name_or_path = str(folder)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocabulary:
        raise BaseCheckpointError(
            f"{what}: expected a tokenizer of at most {vocabulary} tokens, got {len(tokenizer)}. "
            "Put the tokenizer of these weights beside them."
        )
    card = read_card(folder)
    base = Base(
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        weights=known.weights,
        tokenizer_fingerprint=tokenizer_fingerprint,
        config=config,
        files=known.files,
        id=str(card.get("id", folder.resolve().name)),
        revision=str(card.get("revision", "")),
        training=card.get("training"),
    )
    if card:
        check_base(base, _read_identity(card, folder))
    find_head(model)  # kept for whatever runs this model later
    return base


def load_model(folder: Path, placement: Placement | None = None) -> Any:
    """Load a checkpoint's model alone: safetensors only, none of its own code.

    Args:
        folder: Hugging Face checkpoint.
        placement: Device and dtype of the model in memory; the CPU and float32 if None.

    Returns:
        The model in evaluation mode, with no parameter requiring gradients.

    Raises:
        BaseCheckpointError: If weights are missing, malformed, need code of their own or do not
            cover all of the model's parameters.
        ComputeError: If it is larger than the memory there is.
    """
    placement = placement or Placement()
    with stage_checkpoint(folder) as stage:
        config, _ = _read_fitting(stage, folder, placement)
        return _load_staged(stage, folder, config, placement)


def _read_fitting(stage: Path, folder: Path, placement: Placement) -> tuple[Any, str]:
    """Config of a model that memory is there for, and its fingerprint; no weights are read."""
    what = f"Cannot load checkpoint '{folder}'"
    half = "--dtype bfloat16, " if placement.dtype is torch.float32 else ""
    with _loading(what, stage, folder):
        config = read_config(stage, count_tensors(folder), what)
        numbers = check_size(config, find_weight_files(folder), what)
        check_memory(
            numbers * placement.dtype.itemsize,
            placement.device,
            what=what,
            fix=f"Use {half}another --device, or a machine with more memory.",
        )
        # Now: loading writes into a config.
        return config, fingerprint_config(config)


def _load_staged(stage: Path, folder: Path, config: Any, placement: Placement) -> Any:
    """A model from a folder with nothing else."""
    what = f"Cannot load checkpoint '{folder}'"
    with _loading(what, stage, folder), quiet_transformers():
        model, report = AutoModelForCausalLM.from_pretrained(
            str(stage),
            config=config,
            dtype=placement.dtype,
            # Straight to an accelerator, a file at a time.
            device_map=None if placement.device.type == "cpu" else {"": placement.device},
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    model.name_or_path = model.config._name_or_path = str(folder)
    missing = sorted([*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])])
    if missing:
        raise BaseCheckpointError(
            f"{what}: expected all parameters of {type(model).__name__}, got none or another "
            f"shape for {', '.join(missing[:5])} ({len(missing)} in all). Fetch it again."
        )
    return model.eval().requires_grad_(False)


@contextmanager
def _loading(what: str, stage: Path, folder: Path) -> Iterator[None]:
    """Say in one line, of the folder that people know, what a library refused."""
    try:
        yield
    except ComputeError:
        raise
    except BaseCheckpointError as error:
        raise BaseCheckpointError(str(error).replace(str(stage), str(folder))) from error
    except Exception as error:  # transformers raises many kinds on malformed folders
        reason = clean(error, 300).replace(str(stage), str(folder))
        raise BaseCheckpointError(
            f"{what}: expected a causal language model with its tokenizer, "
            f"got {type(error).__name__}: {reason} Check config.json and the tokenizer's files."
        ) from error


def read_card(folder: Path) -> Mapping[str, Any]:
    """What is written down of a base; empty where nothing is."""
    path = find_file(folder, CARD_FILE)
    return {} if path is None else load_json_file(path)


def _read_identity(card: Mapping[str, Any], folder: Path) -> BaseIdentity:
    try:
        return BaseIdentity(**{k: card[k] for k in ("id", "revision", "weights", "tokenizer")})
    except (KeyError, ValueError) as error:
        raise BaseCheckpointError(
            f"Cannot read base checkpoint '{folder}': expected id, revision and fingerprints in "
            f"'{CARD_FILE}', got {' '.join(str(error).split())[:200]}. Fetch the base again."
        ) from error


def write_card(
    folder: Path,
    name: str,
    revision: str,
    training: Mapping[str, Any] | None,
    progress: Progress | None = None,
) -> None:
    """Write down what a base is: id, revision, fingerprints of its files, how it was trained.

    Args:
        folder: The base's checkpoint.
        name: Its id.
        revision: Its revision.
        training: Record of its training; None if it was not trained here.
        progress: See `load_base`.

    Raises:
        StorageError: On I/O errors.
    """
    weights, tensors = fingerprint_tensors(folder, progress)
    card = {
        "format_version": FORMAT_VERSION,
        "id": name,
        "revision": revision,
        "weights": weights,
        "tokenizer": fingerprint_tokenizer(folder),
        "training": training,
    }
    if len(tensors) <= MAX_CARD_TENSORS:
        card["tensors"] = tensors
    write_json(folder / CARD_FILE, card)


def fetch_base(
    source: str,
    folder: Path,
    placement: Placement | None = None,
    progress: Progress | None = None,
) -> Base:
    """Copy a base into a folder: from another, a GGUF file or the Hugging Face Hub; and load it.

    Files are copied byte by byte, so everyone who fetches the same source has the same
    fingerprints. A base that was fetched before is loaded without asking again.

    Args:
        source: A local folder, a GGUF file, or "ID@REVISION" on the Hub.
        folder: Target; absent, empty, or holding the same base.
        placement: Device and dtype of the model in memory; the CPU and float32 if None.
        progress: See `load_base`.

    Raises:
        BaseCheckpointError: If there is no such source, it cannot be loaded, or the target holds
            something else; nothing is left half-copied.
        StorageError: On I/O errors.
    """
    card: Mapping[str, Any] = {}
    if (local := Path(source)).is_dir():
        if local.resolve() == folder.resolve():
            return load_base(folder, placement, progress)
        card = read_card(local)
    name, revision = _name_source(source, card)
    if (folder / CARD_FILE).exists():
        base = load_base(folder, placement, progress)
        if (base.id, base.revision.partition(", ")[0]) == (name, revision) and (
            not local.is_dir() or fingerprint_weights(local, progress) == base.weights
        ):
            return base
    check_free(folder)
    if local.is_dir():  # before it is copied
        with stage_checkpoint(local) as stage:
            _read_fitting(stage, local, placement or Placement())
    with replace_folder(folder) as target:
        done = copy_base(source, target)
        full = ", ".join(filter(None, (revision, done)))
        write_card(target, name, full, card.get("training"), progress)
        base = load_base(target, placement, progress)
    return replace(base, folder=folder)


def _name_source(source: str, card: Mapping[str, Any]) -> tuple[str, str]:
    """Id and revision of what a source holds.

    Raises:
        BaseCheckpointError: If it is no source of a base.
    """
    path = Path(source)
    if path.is_dir():
        return str(card.get("id", path.resolve().name)), str(card.get("revision", ""))
    if _is_gguf(path):
        return path.stem, f"SHA-256 {hash_file(path)[:16]}"
    if hub := _HUB_SOURCE.fullmatch(source):
        return hub["id"], hub["revision"]
    raise BaseCheckpointError(
        f"Cannot fetch base '{source}': expected a folder, a GGUF file, or ID@REVISION of the "
        "Hugging Face Hub, got none of these. Name a revision, e.g. EleutherAI/pythia-70m@main."
    )


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == GGUF_SUFFIX and path.is_file()


def copy_base(source: str, folder: Path) -> str:
    """Put the files of a base into a folder, byte by byte, or as plain weights of a GGUF file.

    Args:
        source: A local folder, a GGUF file, or "ID@REVISION" on the Hub.
        folder: An existing, empty folder.

    Returns:
        What was done to the weights; empty if nothing.

    Raises:
        BaseCheckpointError: If there is no such source, or it cannot be read.
        ConfigError: If a GGUF file is to be read without the package for it.
        OSError: On I/O errors.
    """
    path = Path(source)
    if _is_gguf(path):
        return convert_gguf(path, folder)
    name, revision = _name_source(source, {})
    copy_checkpoint(path if path.is_dir() else download_checkpoint(name, revision), folder)
    return ""


def check_free(folder: Path, *allowed: str) -> None:
    """Check that a folder may be replaced.

    Raises:
        BaseCheckpointError: If it holds anything but the allowed names.
    """
    found = sorted({p.name for p in folder.iterdir()} - set(allowed)) if folder.is_dir() else []
    if found or (folder.exists() and not folder.is_dir()):
        raise BaseCheckpointError(
            f"Cannot put a base into '{folder}': expected an empty or absent folder, or the same "
            f"base, got {', '.join(found[:5]) or 'a file'}. Choose another folder."
        )
