"""Domains that need no download: text that every machine with this package already has."""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

from molora_fed.corpus.documents import choose_evenly
from molora_fed.errors import CorpusError
from molora_fed.types import Document

__all__ = [
    "MIN_CHARACTERS",
    "choose_documents",
    "is_sized",
    "list_sources",
    "read_cpp",
    "read_docstrings",
    "read_headers",
    "read_python",
    "read_readme",
    "read_science",
    "read_sources",
]

DOMAIN_CHARACTERS = 3_200_000
MIN_CHARACTERS = 400
MAX_CHARACTERS = 32_000

# Tests repeat themselves, codecs are tables, and the language reference belongs to `readme`.
_PYTHON_EXCLUDED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings",
     "pydoc_data", "__pycache__"}
)  # fmt: skip
_CPP_SUFFIXES = (".h", ".hpp", ".cuh")
_GENERATED = re.compile(r"@?generated (?:by|from|code)|do not edit", re.IGNORECASE)
_GENERATED_WITHIN = 3_000
# Wheels of torch wrap every header in this guard; it is not part of the sources.
_TORCH_GUARD = re.compile(
    r"\A#if !defined\(TORCH_STABLE_ONLY\)[^\n]*\n|"
    r"#else\n#error \"This file should not be included[^\n]*\n#endif[^\n]*\n?\Z"
)
_OWN_DISTRIBUTION = "molora-fed"
_SCIENCE_PACKAGES = ("numpy", "scipy")
_SCIENCE_EXCLUDED = frozenset({"test", "tests", "testing", "__pycache__"})
_SCIENCE_SOURCE_CHARACTERS = 10_000_000
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def list_sources(root: Path, suffixes: Sequence[str], excluded: frozenset[str]) -> list[Path]:
    """Files below a folder with these endings, by relative path, excluded folders left out."""
    return sorted(
        (
            path
            for path in root.rglob("*")
            if path.suffix in suffixes
            and excluded.isdisjoint(path.relative_to(root).parts)
            and path.is_file()
        ),
        key=lambda path: path.relative_to(root).as_posix(),
    )


def read_sources(root: Path, paths: Iterable[Path]) -> Iterator[Document]:
    """Documents named by relative path; files that are not UTF-8 are passed over."""
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        yield Document(path.relative_to(root).as_posix(), text)


def choose_documents(
    documents: Sequence[Document],
    domain: str,
    where: object,
    *,
    characters: int = DOMAIN_CHARACTERS,
) -> Iterator[Document]:
    """As much as is wanted of a domain, spread evenly over it.

    Args:
        documents: All documents of the domain, in a fixed order.
        domain: Domain name, for the message.
        where: Where was searched, for the message.
        characters: About how much to take.

    Raises:
        CorpusError: If there are no documents at all.
    """
    if not documents:
        raise CorpusError(
            f"Cannot read domain '{domain}': expected text in {where}, got none. "
            "Choose another domain or give your own files."
        )
    sizes = [len(document.text) for document in documents]
    return iter(choose_evenly(documents, sizes, characters))


def is_sized(path: Path) -> bool:
    """Whether a file is worth a document, and not so large that it is most likely a table."""
    return MIN_CHARACTERS <= path.stat().st_size <= MAX_CHARACTERS


def read_python() -> Iterator[Document]:
    """Source files of Python's standard library, of 400 to 32,000 characters each.

    Raises:
        CorpusError: If this Python has no library source on disk.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in list_sources(root, (".py",), _PYTHON_EXCLUDED) if is_sized(p)]
    chosen = choose_evenly(paths, [path.stat().st_size for path in paths], DOMAIN_CHARACTERS)
    return choose_documents(list(read_sources(root, chosen)), "python", root)


def read_headers(root: Path) -> list[Document]:
    """C and C++ headers below a folder, of 400 to 32,000 characters each, none of them generated.

    What wheels of torch wrap every header in is left out.
    """
    paths = [p for p in list_sources(root, _CPP_SUFFIXES, frozenset()) if is_sized(p)]
    return [
        Document(document.name, _TORCH_GUARD.sub("", document.text))
        for document in read_sources(root, paths)
        if not _GENERATED.search(document.text, 0, _GENERATED_WITHIN)
    ]


def read_cpp() -> Iterator[Document]:
    """C++ headers shipped with torch, see `read_headers`.

    Raises:
        CorpusError: If torch ships no headers here.
    """
    # Not imported: a folder is all that is needed, and importing torch takes seconds.
    root = Path(sysconfig.get_path("platlib")) / "torch" / "include"
    return choose_documents(read_headers(root), "cpp", root)


def read_docstrings(source: Document) -> Iterator[Document]:
    """Docstrings of one source file, of at least `MIN_CHARACTERS`; none if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's escape sequences
        try:
            tree = ast.parse(source.text)
        except (SyntaxError, ValueError):
            return
    waiting: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [tree]
    while waiting:
        node = waiting.pop(0)
        text = ast.get_docstring(node)
        if text and MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
            yield Document(f"{source.name}:{getattr(node, 'lineno', 0)}", text + "\n")
        # Only definitions are followed: a walk over every expression takes twice as long.
        waiting += (child for child in node.body if isinstance(child, _DOCUMENTED))


def read_science() -> Iterator[Document]:
    """Docstrings of numpy and scipy, of 400 to 32,000 characters each.

    Raises:
        CorpusError: If neither is installed with its source.
    """
    root = Path(sysconfig.get_path("platlib"))
    paths = [
        path
        for package in _SCIENCE_PACKAGES
        for path in list_sources(root / package, (".py",), _SCIENCE_EXCLUDED)
    ]
    sizes = [path.stat().st_size for path in paths]
    chosen = choose_evenly(paths, sizes, _SCIENCE_SOURCE_CHARACTERS)
    documents = [d for source in read_sources(root, chosen) for d in read_docstrings(source)]
    return choose_documents(documents, "science", root)


def _read_topics() -> Iterator[Document]:
    """Python's language reference as `help()` shows it; nothing if this Python lacks it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        yield Document(f"reference/{name}", text)


def _read_descriptions() -> Iterator[Document]:
    """Long descriptions (usually the README) of installed distributions, each once."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        # `metadata.json` keeps the description whether it came as a body or as a header.
        fields = distribution.metadata.json
        # This project's own page would tie the text to its version.
        if str(fields.get("name")) == _OWN_DISTRIBUTION:
            continue
        found.setdefault(str(fields.get("name", "")).lower(), str(fields.get("description", "")))
    for name, text in sorted(found.items()):
        yield Document(f"description/{name}", text)


def read_readme() -> Iterator[Document]:
    """Long descriptions of installed distributions and Python's language reference.

    Raises:
        CorpusError: If there are neither.
    """
    documents = [
        document
        for document in (*_read_descriptions(), *_read_topics())
        if len(document.text) >= MIN_CHARACTERS
    ]
    return choose_documents(documents, "readme", "installed distributions")
