"""Reads parquet and arrow files and data sets of the Hub in a process of its own.

Over some malformed files the library that reads them (pyarrow 26) does not raise but ends its
process. So the file is read elsewhere, and its rows come back through a pipe, each as JSON with
the columns that text is made of:

    python -P -m molora_fed.corpus.parquet SOURCE MOST_CHARACTERS TEXT_FIELD LOSS_ON
"""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from molora_fed.corpus.raw_text import SPARE, UNPACKED_RATIO, UnreadableError
from molora_fed.corpus.records import TextOptions, choose_columns, parse_record
from molora_fed.storage.untrusted import clean
from molora_fed.types import LossOn

__all__ = [
    "DATASETS",
    "UnreadableError",
    "read_rows",
    "read_texts",
    "write_texts",
]

DATASETS = "datasets:"
"""What a data set of the Hub begins with: datasets:ID[@REVISION][:CONFIG][:SPLIT]."""
_MOST_OF_A_DATA_SET = 2**36
_ROWS = 256  # read at once
_HEAD = struct.Struct(">BQ")  # kind, bytes
_TEXT, _REFUSED, _END = 0, 1, 2


def read_rows(path: Path, options: TextOptions) -> Iterator[Any]:
    """The rows of a file or a data set, in order, with the columns that text is made of.

    Args:
        path: The file; or "datasets:ID".
        options: Which field holds the text; without one, every column that may is taken.

    Raises:
        UnreadableError: If there is no such column, there is more text than a file of its size can
            hold, the file is malformed, or a data set is not to be had.
    """
    source, most = str(path), _MOST_OF_A_DATA_SET
    if not source.startswith(DATASETS):
        source, most = str(path.absolute()), SPARE + UNPACKED_RATIO * path.stat().st_size
    arguments = (source, str(most), options.text_field, options.loss_on)
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "molora_fed.corpus.parquet", *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert child.stdout is not None
    try:
        for number, row in enumerate(read_texts(child.stdout), start=1):
            yield parse_record(row, f"row {number}")
    except EOFError:
        kind = _find_kind(path)
        raise UnreadableError(
            f"no {kind} that can be read (its reader ended with {child.wait()})"
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


def write_texts(
    path: Path, most: int, stream: BinaryIO, options: TextOptions | None = None
) -> None:
    """Write the rows of a file as JSON, or why it cannot be read.

    Args:
        path: The file; or "datasets:ID".
        most: Characters of all rows together; what states more is refused before it is unpacked.
        stream: Where they are written.
        options: Which field holds the text; without one, every column that may is taken.
    """
    characters = 0
    try:
        rows = _list_rows(path, most, options or TextOptions())
        for number, row in enumerate(rows, start=1):
            text = _write_json(row, f"row {number}")
            values = row.values()
            is_flat = all(isinstance(value, str) for value in values)
            characters += sum(map(len, values)) if is_flat else len(text)
            if characters > most:
                raise UnreadableError(_describe_too_much(most))
            _write(stream, _TEXT, text)
        _write(stream, _END, "")
    except UnreadableError as error:
        _write(stream, _REFUSED, str(error))
    stream.flush()


def _write(stream: BinaryIO, kind: int, text: str) -> None:
    data = text.encode()
    stream.write(_HEAD.pack(kind, len(data)))
    stream.write(data)


def _write_json(row: dict[str, Any], where: str) -> str:
    def convert(value: object) -> str:
        if isinstance(value, bytes):
            raise UnreadableError(f"{where}: no text but bytes")
        return str(value)  # dates and numbers of any precision, beside the text

    try:
        return json.dumps(row, ensure_ascii=False, default=convert)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{where}: values that are no JSON") from error


def _describe_too_much(most: int) -> str:
    return f"more than {most:,} characters of text, {UNPACKED_RATIO} times its bytes and more"


def _list_rows(path: Path, most: int, options: TextOptions) -> Iterator[dict[str, Any]]:
    import pyarrow

    source = str(path)
    try:
        if source.startswith(DATASETS):
            yield from _list_data_set(source.removeprefix(DATASETS), options)
        elif _find_kind(path) == "arrow":
            yield from _list_arrow(path, options)
        else:
            yield from _list_parquet(path, most, options)
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = clean(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise UnreadableError(f"no {_find_kind(path)} that can be read ({reason})") from error


def _find_kind(path: Path) -> str:
    """What a source is; of a file by its content, a link may lead to a file of any name."""
    if str(path).startswith(DATASETS):
        return "data set"
    with path.open("rb") as file:
        head = file.read(6)
    return "arrow" if head == b"ARROW1" or head.startswith(b"\xff" * 4) else "parquet"


def _list_parquet(path: Path, most: int, options: TextOptions) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(path)
    schema = metadata.schema.to_arrow_schema()
    columns = choose_columns(schema.names, options)
    if _count_unpacked(metadata, columns) > most:
        raise UnreadableError(_describe_too_much(most))
    # Values stay in their dictionary: a text that comes a million times is held once.
    types = pyarrow.types
    is_text = {
        n: types.is_string(t) or types.is_large_string(t)
        for n, t in zip(schema.names, schema.types, strict=True)
    }
    texts = [name for name in columns if is_text[name]]
    with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
        for batch in file.iter_batches(_ROWS, columns=columns):
            yield from _list_batch(batch, columns)


def _list_batch(batch: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows one at a time: values that are held once are written out once at a time."""
    arrays = [batch.column(name) for name in columns]
    for values in zip(*arrays, strict=True):
        yield {name: value.as_py() for name, value in zip(columns, values, strict=True)}


def _count_unpacked(metadata: Any, columns: list[str]) -> int:
    """Bytes that the pages of columns take unpacked, by a parquet file's own statement."""
    return sum(
        chunk.total_uncompressed_size
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
        if (chunk := metadata.row_group(group).column(column)).path_in_schema.split(".")[0]
        in columns
    )


def _list_arrow(path: Path, options: TextOptions) -> Iterator[dict[str, Any]]:
    """Rows of an arrow file in either form; `Dataset.save_to_disk` writes streams."""
    import pyarrow.ipc

    with path.open("rb") as file:
        is_stream = file.read(6) != b"ARROW1"
        file.seek(0)
        opened = pyarrow.ipc.open_stream(file) if is_stream else pyarrow.ipc.open_file(file)
        with opened as reader:
            columns = choose_columns(reader.schema.names, options)
            batches = (
                reader
                if is_stream
                else (reader.get_batch(n) for n in range(reader.num_record_batches))
            )
            for batch in batches:
                yield from _list_batch(batch, columns)


def _list_data_set(given: str, options: TextOptions) -> Iterator[dict[str, Any]]:
    """Rows of a data set of the Hub, from its cache where there is one."""
    try:
        import datasets  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise UnreadableError(
            "the package 'datasets' is not installed: pip install 'molora-fed[datasets]'"
        ) from error
    name, *rest = given.split(":")
    split = rest.pop() if rest else "train"
    name, _, revision = name.partition("@")
    config = rest.pop() if rest else None
    try:
        found = datasets.load_dataset(name, config, split=split, revision=revision or None)
        columns = choose_columns(found.column_names, options)
        yield from (dict(row) for row in found.select_columns(columns))
    except UnreadableError:
        raise
    except Exception as error:  # whatever it meets on the network and in its cache
        lines = str(error).splitlines() or [type(error).__name__]
        raise UnreadableError(f"no data set that can be read ({clean(lines[0])})") from error


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # whatever prints does not get between the rows
        source, most, text_field, loss_on = sys.argv[1:]
        chosen = TextOptions(text_field, cast(LossOn, loss_on))
        write_texts(Path(source), int(most), answers, chosen)
