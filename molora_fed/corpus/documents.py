"""Reads a contributor's own text: files of many kinds, and folders of them."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from molora_fed.corpus.inventory import Inventory
from molora_fed.corpus.parquet import DATASETS
from molora_fed.corpus.raw_text import UnreadableError
from molora_fed.corpus.readers import DATA_SET, FileKind, SourceFile, find_kind
from molora_fed.corpus.records import RecordReader, TextOptions
from molora_fed.errors import ConfigError, CorpusError
from molora_fed.guard import guarded, one_line, refuse
from molora_fed.plugins import Plugins
from molora_fed.storage.files import is_file, is_folder, resolve_inside
from molora_fed.storage.options import open_callable
from molora_fed.storage.untrusted import clean
from molora_fed.types import Document, Markup

__all__ = [
    "check_domain_options",
    "find_document_fault",
    "is_data_set",
    "open_domain",
    "read_documents",
]

_SHOWN_PROBLEMS = 3
_SHOWN_PATHS = 5
_FIX = "Correct --domain-option KEY=VALUE."
_EXAMPLES = (".txt", ".md", ".jsonl", ".csv", ".html", ".parquet", ".py")

_DESCRIPTIONS = ("state.json", "dataset_info.json", "dataset_dict.json")
"""What `Dataset.save_to_disk` puts beside its data."""


def is_data_set(path: Path) -> bool:
    """Whether a path is no path but names a data set of the Hub, `datasets:ID`."""
    return str(path).startswith(DATASETS)


@dataclass(eq=False)
class _Found:
    """Files to read, and what is wrong with the paths they were looked for in."""

    files: dict[Path, SourceFile] = field(default_factory=dict)
    folders: dict[Path, list[SourceFile]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, path: Path, name: str, kind: FileKind, *, is_named: bool) -> SourceFile:
        known = self.files.setdefault(path, SourceFile(path, name, kind, is_named))
        known.is_named |= is_named
        return known

    def name(self) -> list[SourceFile]:
        """The files with unique names."""
        seen: dict[str, int] = {}
        for file in self.files.values():
            seen[file.name] = seen.get(file.name, 0) + 1
            if seen[file.name] > 1:
                file.name = f"{file.name}~{seen[file.name]}"
        return list(self.files.values())


def _list_files(path: Path, inventory: Inventory) -> list[tuple[Path, str]]:
    """All files of a folder that are not hidden with their names inside it, sorted."""
    found = []

    def show(inner: str) -> str:
        return f"{path.name}/{Path(inner).relative_to(path).as_posix()}"

    def fail(error: OSError) -> None:
        inventory.leave_out(show(error.filename), error.strerror or "cannot be read")

    for folder, subfolders, names in os.walk(path, onerror=fail):
        subfolders.sort()
        for name in list(subfolders):
            if name.startswith("."):
                subfolders.remove(name)
                inventory.leave_out(show(f"{folder}/{name}"), "hidden")
            elif os.path.islink(f"{folder}/{name}"):
                inventory.leave_out(show(f"{folder}/{name}"), "a link to a folder")
        found += [(Path(folder) / name, show(f"{folder}/{name}")) for name in names]
    return sorted(found, key=lambda item: item[1])


def _find_inside(path: Path, found: _Found, inventory: Inventory) -> None:
    """Find what can be read in a folder.

    A link that leads out of the folder is a problem: whoever made the folder could have any file
    of this user read.
    """
    try:
        files = _list_files(path, inventory)
    except RecursionError:
        found.problems.append(f"'{path}': folders nested too deep")
        return
    inside = found.folders[path] = []
    for file, name in files:
        kind = find_kind(file)
        if file.name.startswith("."):
            inventory.leave_out(name, "hidden")
        elif kind is None:
            inventory.leave_out(name, _describe_ending(file))
        elif not is_file(file):
            inventory.leave_out(name, "no file that can be opened")
        elif resolve_inside(file, path) is None:
            found.problems.append(f"'{name}': a link that leads out of the folder")
        elif file.name in _DESCRIPTIONS:
            inventory.leave_out(name, "describes a data set")
        elif file.suffix == ".arrow" and file.name.startswith("cache-"):
            inventory.leave_out(name, "cache of a data set")
        else:
            inside.append(found.add(file.resolve(), name, kind, is_named=False))


def _describe_ending(file: Path) -> str:
    ending = "".join(file.suffixes[-2:]) if file.suffix.lower() == ".gz" else file.suffix
    return f"ending '{ending}' is not read" if ending else "a name without an ending"


def _find_files(paths: Sequence[Path], inventory: Inventory) -> _Found:
    """All files to read; what is wrong with a path is a problem."""
    found = _Found()
    for path in paths:
        try:
            resolved = path if is_data_set(path) else path.expanduser().resolve()
        except (OSError, RuntimeError) as error:  # links in a circle, nobody's home
            found.problems.append(f"'{path}': {error}")
            continue
        kind = find_kind(resolved)
        if kind is DATA_SET:
            found.add(path, str(path), DATA_SET, is_named=True)
        elif is_folder(resolved):
            _find_inside(resolved, found, inventory)
        elif not is_file(resolved):
            found.problems.append(f"'{path}': no such file or folder")
        elif kind is None:
            found.problems.append(f"'{path}': {_describe_ending(resolved)}")
        else:
            found.add(resolved, resolved.name, kind, is_named=True)
    return found


def read_documents(
    paths: Sequence[Path],
    options: TextOptions | None = None,
    *,
    tokenizer: Any = None,
    inventory: Inventory | None = None,
) -> Iterator[Document]:
    """Read text files, folders of them and data sets, in a fixed order.

    `molora_fed.corpus.readers.KINDS` lists the files that are read. One of text, source or HTML is
    one document; of records and tables each is one, see `molora_fed.corpus.records.RecordReader`.
    Folders are read with their subfolders. In a folder, hidden files, those of other kinds and
    those that cannot be read are left out, which the inventory says; documents of white space
    only are passed over.

    Args:
        paths: Files, folders and `datasets:ID`.
        options: Which fields hold text, and which tokens are learned.
        tokenizer: Hugging Face tokenizer of the base, whose template chats are written by; None
            writes them plainly.
        inventory: Gets what was read, what was left out, and why.

    Yields:
        Documents with unique names, relative to the paths given.

    Raises:
        CorpusError: If a path is missing, a file that was named is not readable, a folder has a
            link that leads out of it, or nothing with text was found; all problems are collected
            into one message.
    """
    options, inventory = options or TextOptions(), inventory or Inventory()
    found = _find_files(paths, inventory)
    files, problems = found.name(), found.problems
    records = RecordReader(options, tokenizer)
    num_documents = num_answers = 0
    unread = set(files)
    for file in files:
        documents = _read_file(file, records, problems, inventory)
        num_documents += len(documents)
        if documents:
            unread.discard(file)
        num_answers += sum(d.markup is not None and bool(d.markup.answers) for d in documents)
        # Nothing of a bad collection is used; reading on only completes the message.
        if not problems:
            yield from documents
    if num_documents:
        empty = [folder for folder, inside in found.folders.items() if unread.issuperset(inside)]
        problems += (f"'{folder}': nothing in it that can be read" for folder in empty)
    _check_read(paths, problems, inventory, len(files), num_documents)
    if options.loss_on == "assistant" and num_answers == 0:
        raise CorpusError(
            f"Cannot put the loss on the assistant of {_show(paths)}: expected chats, or "
            f"instructions with responses, got {num_documents} documents without any. Leave "
            "--loss-on out."
        )


def _read_file(
    file: SourceFile, records: RecordReader, problems: list[str], inventory: Inventory
) -> list[Document]:
    """The documents of a file that have text; all of a file or none."""
    try:
        documents = [document for document in file.read(records) if document.text.strip()]
    except UnreadableError as error:
        reason = str(error)
    except OSError as error:
        reason = error.strerror or str(error)
    else:
        if documents:
            inventory.add(file.kind.label, file.name, documents, file.encoding)
        else:
            inventory.leave_out(file.name, "no text in it")
        return documents
    inventory.leave_out(file.name, reason)
    if file.is_named:
        problems.append(f"'{file.name}': {reason}")
    return []


def _show(paths: Sequence[Path]) -> str:
    shown = [f"'{clean(str(path), 500)}'" for path in paths[:_SHOWN_PATHS]]
    more = [f"{len(paths) - _SHOWN_PATHS} more"] if len(paths) > _SHOWN_PATHS else []
    return ", ".join([*shown, *more]) or "(no path)"


def _check_read(
    paths: Sequence[Path],
    problems: Sequence[str],
    inventory: Inventory,
    num_files: int,
    num_documents: int,
) -> None:
    """Refuse a collection with problems, or without text.

    Raises:
        CorpusError: Names the first problems, or the commonest reasons of what was left out.
    """
    shown = _show(paths)
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        tail = f"; and {more} more" if more > 0 else ""
        raise CorpusError(
            f"Cannot read text from {shown}: expected files that can be read, got "
            f"{'; '.join(clean(one, 300) for one in problems[:_SHOWN_PROBLEMS])}{tail}. "
            "Correct these or leave them out."
        )
    if num_documents:
        return
    left_out = inventory.describe_left_out()
    raise CorpusError(
        f"Cannot read text from {shown}: expected at least one document with text, got "
        f"{num_files} files of kinds that are read ({', '.join(_EXAMPLES)} and others) without "
        f"any{f' ({left_out})' if left_out else ''}. Add text."
    )


def check_domain_options(
    domain: str, data: Collection[Path], options: Mapping[str, Any] | None
) -> None:
    """Refuse options of a registered domain beside text that is read instead.

    Raises:
        ConfigError: If both are given.
    """
    if data and options:
        raise ConfigError(
            f"Cannot read domain '{domain}' with options: expected the registered domain's text, "
            f"got data and the options {', '.join(options)}. Leave out --data or --domain-option."
        )


def open_domain(
    name: str, plugins: Plugins, options: Mapping[str, Any] | None = None
) -> Callable[[], Iterator[Document]]:
    """The reader of a registered domain; what it yields is checked as it comes.

    Args:
        name: Registered name.
        plugins: Where it is registered.
        options: Its options; None or empty takes all defaults.

    Raises:
        UnknownNameError: If nobody registers it.
        ConfigError: If the options are wrong; all offending keys are named.
        PluginError: If it cannot be made; from the reader, if the domain's code fails, or yields
            what is no document.
    """
    entry, place = plugins.domains.entry(name), "reading"
    target = open_callable(plugins.domains, name, options, error=ConfigError, fix=_FIX)

    def read() -> Iterator[Document]:
        with guarded(entry, place):
            documents = iter(target())
        while True:
            with guarded(entry, place):
                found = list(islice(documents, 1))
            if not found:
                return
            fault = find_document_fault(found[0])
            if fault is not None:
                raise refuse(entry, place, expected="Documents of text", got=fault)
            yield found[0]

    return read


def find_document_fault(document: Any) -> str | None:
    """Describe why something that a domain yielded is no document of text, or None."""
    if not isinstance(document, Document):
        return type(document).__name__
    if not isinstance(document.name, str) or not isinstance(document.text, str):
        return "a Document whose name or text is no text"
    if not isinstance(document.markup, Markup | None):
        return f"a Document with {type(document.markup).__name__} for markup"
    try:
        f"{document.name}{document.text}".encode()
    except UnicodeEncodeError as error:
        return f"text that is not Unicode in '{one_line(ascii(document.name), 80)}': {error.reason}"
    return None
