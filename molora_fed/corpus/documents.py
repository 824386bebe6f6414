"""Reads a contributor's own text: .txt, .md, .jsonl and .parquet files, or folders of them."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from molora_fed.corpus.parquet import UnreadableError, check_text, read_parquet_texts
from molora_fed.errors import CorpusError
from molora_fed.guard import guarded, one_line, refuse
from molora_fed.plugins import Plugins
from molora_fed.storage.files import is_file, is_folder, resolve_inside
from molora_fed.storage.untrusted import clean
from molora_fed.types import Document

__all__ = ["SUFFIXES", "choose_evenly", "cut_long_documents", "open_domain", "read_documents"]

MAX_SHARE = 0.05
PIECES = 250
MIN_PIECE_CHARACTERS = 2_000
_SHOWN_PROBLEMS = 3


_Item = TypeVar("_Item")


def _decode(data: bytes) -> str:
    """UTF-8 text of a file, a byte-order mark removed.

    Raises:
        UnreadableError: If it is binary or in another encoding.
    """
    if b"\0" in data:
        raise UnreadableError("binary data")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"no UTF-8 at byte {error.start}") from error


def _read_plain(path: Path, name: str) -> Iterator[Document]:
    yield Document(name, _decode(path.read_bytes()))


def _read_json_lines(path: Path, name: str) -> Iterator[Document]:
    for number, line in enumerate(_decode(path.read_bytes()).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            # Beside the text anything may stand; digits without end take quadratic time to read.
            record = json.loads(line, parse_int=str, parse_float=str)
        except (ValueError, RecursionError) as error:
            raise UnreadableError(f"{where}: no JSON object") from error
        if not isinstance(record, dict):
            raise UnreadableError(f"{where}: no JSON object but {type(record).__name__}")
        yield Document(f"{name}:{number}", check_text(record.get("text"), where))


def _read_parquet(path: Path, name: str) -> Iterator[Document]:
    for number, text in enumerate(read_parquet_texts(path), start=1):
        yield Document(f"{name}:{number}", text)


_Reader = Callable[[Path, str], Iterator[Document]]
_READERS: dict[str, _Reader] = {
    ".txt": _read_plain,
    ".md": _read_plain,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}

SUFFIXES = tuple(_READERS)
"""Endings of the files that can be read."""


def _list_files(path: Path, problems: list[str]) -> list[tuple[Path, str]]:
    """The readable files of a folder with their names inside it, hidden ones left out, sorted.

    A link that leads out of the folder is a problem: whoever made the folder could have any file
    of this user read.
    """
    found = []
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            file = Path(folder) / name
            readable = file.suffix.lower() in _READERS and is_file(file)
            if readable and not name.startswith("."):
                shown = f"{path.name}/{file.relative_to(path).as_posix()}"
                if resolve_inside(file, path) is None:
                    problems.append(f"'{shown}': a link that leads out of the folder")
                else:
                    found.append((file, shown))
    return sorted(found, key=lambda item: item[1])


def _find_files(paths: Sequence[Path], problems: list[str]) -> list[tuple[Path, str, _Reader]]:
    """All files to read, with unique names and how; what is wrong with a path is a problem."""
    files: dict[Path, str] = {}
    for path in paths:
        try:
            resolved = path.expanduser().resolve()
        except (OSError, RuntimeError) as error:  # links in a circle, nobody's home
            problems.append(f"'{path}': {error}")
            continue
        if is_folder(resolved):
            before = len(problems)
            inside = _list_files(resolved, problems)
            if not inside and len(problems) == before:
                problems.append(f"'{path}': no {', '.join(SUFFIXES)} file in it")
            for file, name in inside:
                files.setdefault(file.resolve(), name)
        elif not is_file(resolved):
            problems.append(f"'{path}': no such file or folder")
        elif resolved.suffix.lower() not in _READERS:
            problems.append(f"'{path}': ending '{resolved.suffix}' is not read")
        else:
            files.setdefault(resolved, resolved.name)
    seen: dict[str, int] = {}
    named = []
    for file, name in files.items():
        seen[name] = seen.get(name, 0) + 1
        # By the ending of the name: a link may lead to a file without one.
        reader = _READERS[Path(name).suffix.lower()]
        named.append((file, name if seen[name] == 1 else f"{name}~{seen[name]}", reader))
    return named


def read_documents(paths: Sequence[Path]) -> Iterator[Document]:
    """Read text files and folders of them, in a fixed order.

    A .txt or .md file is one document; a .jsonl file holds one JSON object with a string "text"
    per line; a .parquet file has a string column "text". Text is UTF-8. Folders are read with
    their subfolders; files with other endings in them and hidden files are passed over, and so
    are documents of white space only.

    Args:
        paths: Files and folders.

    Yields:
        Documents with unique names, relative to the paths given.

    Raises:
        CorpusError: If a path is missing or not readable, or nothing but white space was found;
            all problems are collected into one message.
    """
    problems: list[str] = []
    files = _find_files(paths, problems)
    num_documents = 0
    for file, name, reader in files:
        try:
            for document in reader(file, name):
                if document.text.strip():
                    num_documents += 1
                    # Nothing of a bad collection is used; reading on only completes the message.
                    if not problems:
                        yield document
        except UnreadableError as error:
            problems.append(f"'{name}': {error}")
        except OSError as error:
            problems.append(f"'{name}': {error.strerror or error}")
    shown = ", ".join(f"'{path}'" for path in paths) or "(no path)"
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        tail = f"; and {more} more" if more > 0 else ""
        raise CorpusError(
            f"Cannot read text from {shown}: expected UTF-8 files {', '.join(SUFFIXES)}, got "
            f"{'; '.join(clean(one, 300) for one in problems[:_SHOWN_PROBLEMS])}{tail}. "
            "Correct these or leave them out."
        )
    if num_documents == 0:
        raise CorpusError(
            f"Cannot read text from {shown}: expected at least one document with text, got "
            f"{len(files)} files without any. Add text."
        )


def cut_long_documents(documents: Sequence[Document]) -> list[Document]:
    """Cut up documents that alone hold more than a twentieth of all text.

    One large file could otherwise not be split at all. Its pieces, of about 1/250 of all text
    each, end at blank lines where possible and are documents of their own from then on, so that
    neighbouring pieces may lie in different splits. All other documents stay whole.

    Args:
        documents: All documents of a domain.

    Returns:
        The documents in the same order; pieces are named "<name>#1", "<name>#2", ...
    """
    total = sum(len(document.text) for document in documents)
    piece = max(total // PIECES, MIN_PIECE_CHARACTERS)
    result: list[Document] = []
    for document in documents:
        if len(document.text) > max(MAX_SHARE * total, piece):
            parts = _cut(document.text, piece)
            result += (Document(f"{document.name}#{n}", part) for n, part in enumerate(parts, 1))
        else:
            result.append(document)
    return result


def _cut(text: str, size: int) -> list[str]:
    """Pieces of at least half of and at most `size` characters (the last may be shorter)."""
    pieces, start = [], 0
    while len(text) - start > size:
        window = text[start + size // 2 : start + size]
        cuts = [window.rfind("\n\n") + 2, window.rfind("\n") + 1, window.rfind(" ") + 1]
        found = next((cut for cut, width in zip(cuts, (2, 1, 1), strict=True) if cut >= width), 0)
        end = start + (size // 2 + found if found else size)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]] if text[start:].strip() else pieces


def choose_evenly(items: Sequence[_Item], sizes: Iterable[int], cap: int) -> list[_Item]:
    """Keep every so-maniest item so that about `cap` characters remain.

    Args:
        items: Items in a fixed order.
        sizes: Characters of each.
        cap: Characters to keep.

    Returns:
        Items spread evenly over the whole sequence, in order; all of them if they fit.
    """
    total = sum(sizes)
    if total <= cap:
        return list(items)
    share, due, kept = cap / total, 0.5, []
    for item in items:
        due += share
        if due >= 1:
            due -= 1
            kept.append(item)
    return kept


def open_domain(name: str, plugins: Plugins) -> Callable[[], Iterator[Document]]:
    """The reader of a registered domain; what it yields is checked as it comes.

    Args:
        name: Registered name.
        plugins: Where it is registered.

    Raises:
        UnknownNameError: If nobody registers it.
        PluginError: From the reader: if the domain's code fails, or yields what is no document.
    """
    entry, place = plugins.domains.entry(name), "reading"
    target = plugins.domains.resolve(name)

    def read() -> Iterator[Document]:
        with guarded(entry, place):
            documents = iter(target())
        while True:
            with guarded(entry, place):
                found = list(islice(documents, 1))
            if not found:
                return
            fault = _find_document_fault(found[0])
            if fault is not None:
                raise refuse(entry, place, expected="Documents of text", got=fault)
            yield found[0]

    return read


def _find_document_fault(document: Any) -> str | None:
    if not isinstance(document, Document):
        return type(document).__name__
    if not isinstance(document.name, str) or not isinstance(document.text, str):
        return "a Document whose name or text is no text"
    try:
        f"{document.name}{document.text}".encode()
    except UnicodeEncodeError as error:
        return f"text that is not Unicode in '{one_line(ascii(document.name), 80)}': {error.reason}"
    return None
