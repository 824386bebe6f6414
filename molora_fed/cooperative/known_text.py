"""Where contributors' prepared corpora lie, on a machine that holds both sides of a cooperative.

The demo and simulated federations note it in the coordinator's home, so that a fusion can compare
held-out blocks with all train text. A cooperative of several machines has no such note.
"""

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from molora_fed.errors import ConfigError
from molora_fed.storage.files import write_json

__all__ = ["read_known_text", "write_known_text"]

FILE = "known_text.json"
FORMAT_VERSION = 1


class _Note(BaseModel):
    """Content of the file: folders of prepared corpora by contributor."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format_version: int
    corpora: dict[str, str]


def write_known_text(cooperative: Path, corpora: Mapping[str, Path]) -> None:
    """Note where contributors' prepared corpora lie, or will lie once they are made.

    Args:
        cooperative: The coordinator's home.
        corpora: Folders by contributor's name.

    Raises:
        StorageError: On I/O errors.
    """
    folders = {name: str(folder.absolute()) for name, folder in corpora.items()}
    note = _Note(format_version=FORMAT_VERSION, corpora=folders)
    write_json(cooperative / FILE, note.model_dump())


def read_known_text(cooperative: Path) -> dict[str, Path]:
    """Folders of prepared corpora by contributor's name; empty without a note.

    Raises:
        ConfigError: If the note is malformed.
    """
    path = cooperative / FILE
    if not path.is_file():
        return {}
    try:
        note = _Note.model_validate_json(path.read_bytes())
        if note.format_version != FORMAT_VERSION:
            raise ValueError(f"format version {note.format_version}")
    except (OSError, ValidationError, ValueError) as error:
        raise ConfigError(
            f"Cannot read '{path}': expected folders of prepared corpora by contributor, got "
            f"{' '.join(str(error).split())[:200]}. Delete the file; it is written by the demo."
        ) from error
    return {name: Path(folder) for name, folder in note.corpora.items()}
