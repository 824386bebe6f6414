"""Kinds of files that text is read from, by their endings, and how each is read."""

import csv
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from molora_fed.corpus.html_text import extract_text
from molora_fed.corpus.parquet import DATASETS, read_rows
from molora_fed.corpus.raw_text import UnreadableError, read_text
from molora_fed.corpus.records import RecordReader, parse_record
from molora_fed.types import Document

__all__ = ["DATA_SET", "KINDS", "FileKind", "SourceFile", "find_kind"]

MAX_PAGE_CHARACTERS = 2**26
MAX_FIELD_CHARACTERS = 2**24
"""Of a field of CSV."""
_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset=[\"']?([\w-]{1,40})", re.IGNORECASE)


@dataclass(eq=False)
class SourceFile:
    """A file that is read.

    Attributes:
        path: Where it lies; of a data set of the Hub "datasets:ID".
        name: Its name, unique among those that are read.
        kind: How it is read.
        is_named: Whether it was named itself, not found in a folder.
        encoding: Set while it is read: empty for UTF-8, with "?" where it was guessed.
    """

    path: Path
    name: str
    kind: "FileKind"
    is_named: bool
    encoding: str = ""

    def read(self, records: RecordReader) -> Iterator[Document]:
        """Its documents.

        Raises:
            UnreadableError: If it cannot be read as what its ending says.
            OSError: If it cannot be opened.
        """
        return self.kind.read(self, records)

    def decode(self, declared: re.Pattern[bytes] | None = None) -> str:
        """Its text; sets `encoding`."""
        text, self.encoding = read_text(self.path, packed=self.kind.is_packed, declared=declared)
        return text


@dataclass(frozen=True)
class FileKind:
    """A kind of file.

    Attributes:
        label: What tables call it.
        read: Yields the documents of a file.
        is_text: Whether its bytes are text, so that it may be packed with gzip.
        is_packed: Whether it is.
    """

    label: str
    read: Callable[[SourceFile, RecordReader], Iterator[Document]]
    is_text: bool = True
    is_packed: bool = False


def _read_plain(file: SourceFile, records: RecordReader) -> Iterator[Document]:
    yield Document(file.name, file.decode())


def _read_json_lines(file: SourceFile, records: RecordReader) -> Iterator[Document]:
    yield from _split_lines(file, file.decode(), records)


def _split_lines(file: SourceFile, text: str, records: RecordReader) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"line {number}"
            yield records.read(f"{file.name}:{number}", parse_record(line, where), where)


def _read_json(file: SourceFile, records: RecordReader) -> Iterator[Document]:
    """A list of records, or one record; else JSON lines, which many tools call .json."""
    text = file.decode()
    try:
        value = parse_record(text, "the file")
    except UnreadableError:
        yield from _split_lines(file, text, records)
        return
    found = value if isinstance(value, list) else [value]
    for number, record in enumerate(found, start=1):
        yield records.read(f"{file.name}:{number}", record, f"record {number}")


def _read_csv(file: SourceFile, records: RecordReader) -> Iterator[Document]:
    text = file.decode()
    header = text.lstrip().split("\n", 1)[0]
    # Decimal commas make semicolons the separator of half of Europe.
    yield from _read_table(file, records, _parse_table(text, max(",;\t|", key=header.count)))


def _read_tsv(file: SourceFile, records: RecordReader) -> Iterator[Document]:
    text = file.decode()
    try:
        rows = _parse_table(text, "\t")
    except UnreadableError:  # quotes that are a part of the text
        rows = _parse_table(text, "\t", is_quoted=False)
    yield from _read_table(file, records, rows)


def _parse_table(text: str, separator: str, *, is_quoted: bool = True) -> list[list[str]]:
    """Rows of a table, empty ones left out; the first is the header.

    Raises:
        UnreadableError: If it is malformed, or rows differ in length.
    """
    # The limit belongs to the module, not to a reader.
    before = csv.field_size_limit(MAX_FIELD_CHARACTERS)
    try:
        stream = io.StringIO(text, newline="")
        reader = csv.reader(
            stream,
            delimiter=separator,
            quoting=csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE,
            strict=True,
        )
        rows = [row for row in reader if row]
    except csv.Error as error:
        raise UnreadableError(f"no table that can be read ({error})") from error
    finally:
        csv.field_size_limit(before)
    for number, row in enumerate(rows[1:], start=1):
        if len(row) != len(rows[0]):
            raise UnreadableError(f"row {number}: {len(row)} fields under {len(rows[0])} names")
    return rows


def _read_table(
    file: SourceFile, records: RecordReader, rows: list[list[str]]
) -> Iterator[Document]:
    header = [name.strip() for name in rows[0]] if rows else []
    if len(set(header)) != len(header):
        raise UnreadableError("two columns of one name")
    for number, row in enumerate(rows[1:], start=1):
        record = dict(zip(header, row, strict=True))
        yield records.read(f"{file.name}:{number}", record, f"row {number}")


def _read_html(file: SourceFile, records: RecordReader) -> Iterator[Document]:
    page = file.decode(_CHARSET)
    if len(page) > MAX_PAGE_CHARACTERS:
        raise UnreadableError(f"a page of more than {MAX_PAGE_CHARACTERS:,} characters")
    yield Document(file.name, extract_text(page))


def _read_rows(file: SourceFile, records: RecordReader) -> Iterator[Document]:
    for number, row in enumerate(read_rows(file.path, records.options), start=1):
        yield records.read(f"{file.name}:{number}", row, f"row {number}")


_PLAIN = ".txt .text .md .markdown .mdx .rst .org .adoc .asciidoc .tex .bib"
_SOURCE = (
    ".py .pyi .pyx .c .h .cc .cpp .cxx .hh .hpp .hxx .cu .cuh .m .mm .js .mjs .cjs .jsx .ts .mts "
    ".tsx .vue .svelte .java .kt .kts .scala .groovy .gradle .clj .go .rs .zig .nim .d .swift "
    ".dart .cs .fs .vb .rb .php .pl .pm .lua .r .jl .hs .ml .mli .elm .ex .exs .erl .lisp .el "
    ".scm .rkt .f .f90 .f95 .pas .adb .ads .asm .s .v .sv .vhd .vhdl .sh .bash .zsh .fish .ps1 "
    ".bat .sql .proto .thrift .graphql .cmake .mk .nix .tf .css .scss .sass .less .sty .cls "
    ".yaml .yml .toml .ini .cfg"
)
KINDS: dict[str, FileKind] = {
    **dict.fromkeys(_PLAIN.split(), FileKind("text", _read_plain)),
    **dict.fromkeys(_SOURCE.split(), FileKind("source", _read_plain)),
    **dict.fromkeys((".jsonl", ".ndjson"), FileKind("JSON lines", _read_json_lines)),
    ".json": FileKind("JSON", _read_json),
    ".csv": FileKind("CSV", _read_csv),
    **dict.fromkeys((".tsv", ".tab"), FileKind("TSV", _read_tsv)),
    **dict.fromkeys((".html", ".htm", ".xhtml"), FileKind("HTML", _read_html)),
    ".parquet": FileKind("parquet", _read_rows, is_text=False),
    ".arrow": FileKind("arrow", _read_rows, is_text=False),
}
"""Kinds of files by ending, in lower case; those of text may end in .gz beside."""

DATA_SET = FileKind("data set", _read_rows, is_text=False)
"""A data set of the Hugging Face Hub, `datasets:ID`."""


def find_kind(path: PurePath) -> FileKind | None:
    """How a file is read, by its name; None if it is not read.

    Args:
        path: The name as it was given or found: a link may lead to a file without an ending.
    """
    if str(path).startswith(DATASETS):
        return DATA_SET
    suffix = path.suffix.lower()
    if suffix != ".gz":
        return KINDS.get(suffix)
    inner = KINDS.get(PurePath(path.stem).suffix.lower())
    if inner is None or not inner.is_text:
        return None
    return FileKind(f"{inner.label}, gzip", inner.read, is_packed=True)
