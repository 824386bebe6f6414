"""Reads parquet files in a process of its own.

Over some malformed files the library that reads them (pyarrow 26) does not raise but ends its
process. So the file is read elsewhere, and its texts come back through a pipe:

    python -P -m molora_fed.corpus.parquet FILE MOST_CHARACTERS
"""

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from molora_fed.storage.untrusted import clean

__all__ = ["UnreadableError", "check_text", "read_parquet_texts", "read_texts", "write_texts"]

_ROWS = 256  # read at once
_RATIO = 200  # characters of text for each byte of a file; packed text has 3 to 20
_SPARE = 2**22  # beside, so that small files may hold a text many times
_HEAD = struct.Struct(">BQ")  # kind, bytes
_TEXT, _REFUSED, _END = 0, 1, 2


class UnreadableError(Exception):
    """Why one file cannot be read; collected over all files before anything is raised."""


def check_text(value: object, where: str) -> str:
    """A record's text.

    Raises:
        UnreadableError: If it is no text, or holds half characters that no encoding can write.
    """
    if not isinstance(value, str):
        raise UnreadableError(f"{where}: no text in field 'text' but {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UnreadableError(f"{where}: half a character (surrogate)") from error
    return value


def read_parquet_texts(path: Path) -> Iterator[str]:
    """The texts of column `text`, in order.

    Raises:
        UnreadableError: If there is no such column, a value is no text, there is more text than a
            file of its size can hold, or the file is malformed.
    """
    most = _SPARE + _RATIO * path.stat().st_size
    module = "molora_fed.corpus.parquet"
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", module, str(path.absolute()), str(most)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert child.stdout is not None
    try:
        yield from read_texts(child.stdout)
    except EOFError:
        raise UnreadableError(
            f"no parquet that can be read (its reader ended with {child.wait()})"
        ) from None
    finally:
        child.stdout.close()
        child.kill()
        child.wait()


def read_texts(stream: Any) -> Iterator[str]:
    """What `write_texts` writes.

    Args:
        stream: Binary stream.

    Raises:
        EOFError: If it ends before its end is said.
        UnreadableError: If that is what was written.
    """
    while True:
        kind, num_bytes = _HEAD.unpack(_read(stream, _HEAD.size))
        text = _read(stream, num_bytes).decode()
        if kind == _END:
            return
        if kind == _REFUSED:
            raise UnreadableError(text)
        yield text


def _read(stream: BinaryIO, num_bytes: int) -> bytes:
    data = stream.read(num_bytes)
    if len(data) != num_bytes:
        raise EOFError
    return data


def write_texts(path: Path, most: int, stream: BinaryIO) -> None:
    """Write the texts of a file, or why it cannot be read.

    Args:
        path: The file.
        most: Characters of all texts together; what states more is refused before it is unpacked.
        stream: Where they are written.
    """
    try:
        for text in _list_texts(path, most):
            _write(stream, _TEXT, text)
        _write(stream, _END, "")
    except UnreadableError as error:
        _write(stream, _REFUSED, str(error))
    stream.flush()


def _write(stream: BinaryIO, kind: int, text: str) -> None:
    data = text.encode()
    stream.write(_HEAD.pack(kind, len(data)))
    stream.write(data)


def _list_texts(path: Path, most: int) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    number = characters = 0
    too_much = f"more than {most:,} characters of text, {_RATIO} times its bytes and more"
    try:
        metadata = pyarrow.parquet.read_metadata(path)
        columns = metadata.schema.to_arrow_schema().names
        if "text" not in columns:
            shown = clean(", ".join(columns))
            raise UnreadableError(f"no column 'text' among {shown or 'none'}")
        if _count_unpacked(metadata) > most:
            raise UnreadableError(too_much)
        # Values stay in their dictionary: a text that comes a million times is held once.
        with pyarrow.parquet.ParquetFile(path, read_dictionary=["text"]) as file:
            for batch in file.iter_batches(_ROWS, columns=["text"]):
                for value in batch.column(0):
                    number += 1
                    text = check_text(value.as_py(), f"row {number}")
                    characters += len(text)
                    if characters > most:
                        raise UnreadableError(too_much)
                    yield text
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = clean(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise UnreadableError(f"no parquet that can be read ({reason})") from error


def _count_unpacked(metadata: Any) -> int:
    """Bytes that the pages of column `text` take unpacked, by a parquet file's own statement."""
    return sum(
        chunk.total_uncompressed_size
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
        if (chunk := metadata.row_group(group).column(column)).path_in_schema == "text"
    )


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # whatever prints does not get between the texts
        write_texts(Path(sys.argv[1]), int(sys.argv[2]), answers)
