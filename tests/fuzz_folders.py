"""A file, or a folder as one JSON value, so that its files are changed inside their structure.

`{"files": {name: entry, ...}, ...}`; what stands beside the files is for the target. An entry is
the file's text, or an object with one of

    json      a JSON value
    lines     texts or JSON values, a line each; the last one without newline
    tensors   the header of a safetensors file without places; its numbers are zeros, or of the byte
              `fill`
    base64    bytes
    gzip      an entry whose bytes are packed
    text      a text, perhaps in an `encoding` and repeated `times`
    link      where a link leads
    folder    any value: an empty folder

and perhaps `size`: bytes to which the file is lengthened, as a hole that takes no memory.
"""

import base64
import contextlib
import gzip
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fuzz_mutators import lay_out

from molora_fed.errors import MoloraError

__all__ = [
    "Run",
    "describe_files",
    "encode_input",
    "find_place",
    "limit_memory",
    "read_input",
    "refuse_in_one_line",
    "replacing",
    "run_in_folder",
    "write_files",
]

Run = Callable[[bytes], None]
MEMORY_BYTES = 2**30
"""What a process may need beyond what it has once everything is imported."""
MOST_BYTES = 68 * 2**20
"""Longest file: a little beyond the largest of the limits that is met by a file's size."""
MOST_REPEATED = 6 * 2**20
"""Bytes of a text that is repeated: beyond what a small packed file may hold."""


def limit_memory(more: int = MEMORY_BYTES) -> None:
    """Let this process have so much more memory than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def replacing(path: Path, call: Callable[[], object]) -> Run:
    """A run that gives a file the input's bytes, and calls a function."""

    def run(data: bytes) -> None:
        path.write_bytes(data)
        call()

    return run


def refuse_in_one_line(call: Callable[[], object]) -> None:
    """Call what may refuse an input; for targets whose seeds are refused, too.

    Raises:
        AssertionError: If it refuses in more than a line.
    """
    try:
        call()
    except MoloraError as error:
        if "\n" in str(error) or len(str(error)) > 5_000:
            raise AssertionError(f"refused in more than a line: {error}") from error


def encode_input(files: Mapping[str, Any], **beside: Any) -> bytes:
    """An input of a target that reads a folder."""
    return json.dumps({"files": files, **beside}).encode()


def read_input(data: bytes) -> dict[str, Any]:
    """An input as an object; whatever is none describes no files."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {}


def run_in_folder(
    folder: Path, call: Callable[[Path, dict[str, Any]], object], *, most: int = MOST_BYTES
) -> Run:
    """A run that writes an input's files, and calls a function with their folder and the input.

    Args:
        folder: Scratch; the files go to `input` in it, which does not exist if there are none.
        call: The function.
        most: Longest file.
    """
    place = folder / "input"

    def run(data: bytes) -> None:
        value = read_input(data)
        if os.path.lexists(place):
            shutil.rmtree(place, ignore_errors=True)
        write_files(value.get("files"), place, most=most)
        call(place, value)

    return run


def find_place(name: object, folder: Path) -> Path | None:
    """The path of a name inside a folder; None if it would leave it, or no file can have it."""
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        return None
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return None
    return folder.joinpath(*parts)


def write_files(files: Any, folder: Path, *, most: int = MOST_BYTES) -> None:
    """Write what an input describes, as far as a disk can hold it; links come last."""
    links = []
    for name, entry in files.items() if isinstance(files, dict) else ():
        path = find_place(name, folder)
        if path is None:
            continue
        with contextlib.suppress(OSError, ValueError):  # e.g. a name of a file that is a folder
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(entry, dict) and "folder" in entry:
                path.mkdir(exist_ok=True)
            elif isinstance(entry, dict) and "link" in entry:
                links.append((path, str(entry["link"])))
            else:
                _write(path, entry, most)
    for path, target in links:  # so that nothing is written where they lead
        with contextlib.suppress(OSError, ValueError):
            path.symlink_to(target)


def _write(path: Path, entry: Any, most: int) -> None:
    data = _build(entry)
    if data is not None:
        path.write_bytes(data)
    size = entry.get("size") if isinstance(entry, dict) else None
    if isinstance(size, int) and size > 0:
        path.touch()
        if size > path.stat().st_size:
            os.truncate(path, min(size, most))


def _build(entry: Any) -> bytes | None:
    """The bytes of a file; None if the entry has none."""
    if isinstance(entry, str):
        return entry.encode("utf-8", "surrogatepass")
    if not isinstance(entry, dict):
        return b""
    if "json" in entry:
        return json.dumps(entry["json"]).encode()
    if "tensors" in entry:
        fill = entry.get("fill")
        body = bytes([fill % 256]) * 2**20 if isinstance(fill, int) else b""
        return lay_out(entry["tensors"], body)
    if "gzip" in entry:
        return gzip.compress(_build(entry["gzip"]) or b"", mtime=0)
    if "text" in entry:
        return _build_text(entry)
    if "base64" in entry:
        return base64.b64decode(str(entry["base64"]))
    if isinstance(entry.get("lines"), list):
        lines = (line if isinstance(line, str) else json.dumps(line) for line in entry["lines"])
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    return None if "size" in entry else b""


def _build_text(entry: dict[str, Any]) -> bytes:
    text, encoding, times = str(entry["text"]), entry.get("encoding"), entry.get("times")
    try:
        data = text.encode(str(encoding or "utf-8"), "replace")
    except (LookupError, UnicodeError):  # no encoding
        data = text.encode("utf-8", "surrogatepass")
    if isinstance(times, int) and times > 0 and data:
        data *= min(times, 1 + MOST_REPEATED // len(data))
    return data


def describe_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Entries of a folder's files; of tensors only the header, of a link where it leads."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    chosen = found if names is None else names
    return {name: _describe(found[name]) for name in chosen if not found[name].is_dir()}


def _describe(path: Path) -> Any:
    if path.is_symlink():
        return {"link": os.readlink(path)}
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        for name, entry in header.items():
            if name != "__metadata__":
                del entry["data_offsets"]
        return {"tensors": header}
    if path.suffix == ".json":
        return {"json": json.loads(data)}
    if path.suffix == ".jsonl":
        return {"lines": data.decode().split("\n")}
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}
