"""A contributor's own copy of the base: taken instead of the server's, once it proves the same."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molora_fed.charter import Charter, load_charter
from molora_fed.errors import BaseCheckpointError, describe_mismatch
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.letters import CharterLetter
from molora_fed.federation.messages import Shipment, is_weights_file, list_describing
from molora_fed.storage.files import hash_file, replace_folder, write_bytes

__all__ = ["take_own_base"]

_DESCRIPTION = "base-description"


def take_own_base(home: ContributorHome, letter: CharterLetter, source: str) -> bool:
    """Put a contributor's own copy of the base where the server's would lie; whether it is there.

    Of the server's files only what describes the base is waited for, e.g. `base.json`; no byte of
    the checkpoint itself is sent.

    Args:
        home: The contributor's home, its charter accepted.
        letter: The charter's letter.
        source: A folder, a GGUF file, or "ID@REVISION" on the Hub.

    Raises:
        BaseCheckpointError: If there is no such copy, or it is another base; nothing is left.
        StorageError: On I/O errors.
    """
    marker = home.shipments / letter.base.id
    if marker.exists() and home.base.is_dir():
        return True
    describing = list_describing(letter.base)
    if home.parts.missing(describing, part_bytes=letter.part_bytes):
        return False
    from molora_fed.models.base import copy_base

    description = home.root / _DESCRIPTION
    home.parts.assemble(describing, description, part_bytes=letter.part_bytes)
    with replace_folder(home.base) as target:
        copy_base(source, target)
        _check_same(target, source, description, letter.base, load_charter(home.charter))
        for entry in describing.files:
            write_bytes(target / entry.name, (description / entry.name).read_bytes())
    write_bytes(marker, home.base.name.encode())
    home.parts.discard(describing, part_bytes=letter.part_bytes)
    shutil.rmtree(description, ignore_errors=True)
    return True


def _check_same(
    folder: Path, source: str, description: Path, base: Shipment, charter: Charter
) -> None:
    """Hold a copy against the charter and the server's list of files.

    Raises:
        BaseCheckpointError: Naming the first tensor, or the files, that differ.
    """
    from molora_fed.models.base import read_card
    from molora_fed.models.fingerprints import fingerprint_tensors

    identity = charter.identity.base
    what = f"Cannot use '{source}' as the base of cooperative '{charter.identity.name}'"
    fix = "Leave --base out to have it sent, or fetch the cooperative's base."
    weights, tensors = fingerprint_tensors(folder)
    if weights != identity.weights:
        first = _find_first_difference(read_card(description).get("tensors"), tensors)
        raise BaseCheckpointError(
            describe_mismatch(
                what,
                expected=f"{identity.id} with weights {identity.weights[:16]}",
                got=weights[:16] + (f", first other in tensor '{first}'" if first else ""),
                fix=fix,
            )
        )
    described = {entry.name for entry in list_describing(base).files}
    differing = [
        entry.name
        for entry in base.files
        if entry.name not in described and not is_weights_file(entry.name)
        if not (folder / entry.name).is_file() or hash_file(folder / entry.name) != entry.sha256
    ]
    if differing:
        raise BaseCheckpointError(
            describe_mismatch(
                what,
                expected=f"the files of {identity.id}",
                got=f"the same weights, but another {', '.join(differing[:4])}",
                fix=fix,
            )
        )


def _find_first_difference(known: Any, own: Mapping[str, str]) -> str:
    """The first tensor by name that one of two lacks or that differs; empty if not known."""
    if not isinstance(known, dict) or not known:
        return ""
    names = sorted({str(name) for name in known} | own.keys())
    return next((name for name in names if known.get(name) != own.get(name)), "")
