"""Narrow domains that need no download: areas of the standard library, headers, docstrings.

The wide domains of `builtin` are for a few contributors; these are for many, each about as large
as what one of twenty would bring.
"""

import sysconfig
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from molora_fed.corpus.builtin import (
    choose_documents,
    is_sized,
    list_sources,
    read_docstrings,
    read_headers,
    read_sources,
)
from molora_fed.corpus.documents import choose_evenly
from molora_fed.types import Document

__all__ = [
    "AREA_CHARACTERS",
    "read_concurrency",
    "read_header_family",
    "read_headers_of_c10",
    "read_headers_of_python",
    "read_library_area",
    "read_matplotlib",
    "read_network",
    "read_networkx",
    "read_package_docstrings",
    "read_ray",
    "read_sqlalchemy",
    "read_sympy",
    "read_tools",
    "read_torch",
    "read_transformers",
]

AREA_CHARACTERS = 900_000
_SOURCE_CHARACTERS = 6_000_000
_EXCLUDED = frozenset({"test", "tests", "testing", "idle_test", "_vendor", "__pycache__"})


def _list_part(root: Path, part: str) -> list[Path]:
    """The files of a package, or a module's own."""
    if part.endswith(".py"):
        return [root / part]
    return list_sources(root / part, (".py",), _EXCLUDED)


def read_library_area(area: str, parts: Sequence[str]) -> Iterator[Document]:
    """Source of some packages and modules of Python's standard library.

    Args:
        area: Name of the area, for messages.
        parts: Packages and modules, e.g. "asyncio" or "queue.py".

    Raises:
        CorpusError: If this Python has none of them on disk.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for part in parts for path in _list_part(root, part)]
    paths = [path for path in files if path.is_file() and is_sized(path)]
    found = list(read_sources(root, paths))
    return choose_documents(found, f"library-{area}", root, characters=AREA_CHARACTERS)


def read_header_family(family: str, root: Path) -> Iterator[Document]:
    """C and C++ headers below a folder.

    Args:
        family: Name of the family, for messages.
        root: The folder.

    Raises:
        CorpusError: If there are none.
    """
    domain = f"headers-{family}"
    return choose_documents(read_headers(root), domain, root, characters=AREA_CHARACTERS)


def read_package_docstrings(package: str) -> Iterator[Document]:
    """Docstrings of an installed package, of 400 to 32,000 characters each.

    Args:
        package: Its folder's name.

    Raises:
        CorpusError: If it is not installed with its source.
    """
    site = Path(sysconfig.get_path("platlib"))
    paths = list_sources(site / package, (".py",), _EXCLUDED)
    chosen = choose_evenly(paths, [path.stat().st_size for path in paths], _SOURCE_CHARACTERS)
    found = [d for source in read_sources(site, chosen) for d in read_docstrings(source)]
    where = site / package
    return choose_documents(found, f"docstrings-{package}", where, characters=AREA_CHARACTERS)


def read_headers_of_python() -> Iterator[Document]:
    """Headers of Python's C interface.

    Raises:
        CorpusError: If this Python has none on disk.
    """
    return read_header_family("python", Path(sysconfig.get_path("include")))


def read_headers_of_c10() -> Iterator[Document]:
    """Headers of torch's core library.

    Raises:
        CorpusError: If torch ships none here.
    """
    return read_header_family("c10", Path(sysconfig.get_path("platlib"), "torch/include/c10"))


read_concurrency = partial(
    read_library_area,
    "concurrency",
    ("asyncio", "concurrent", "multiprocessing", "_pydecimal.py", "contextlib.py", "queue.py",
     "sched.py", "selectors.py", "signal.py", "subprocess.py", "threading.py", "weakref.py"),
)  # fmt: skip
read_network = partial(
    read_library_area,
    "network",
    ("email", "html", "http", "json", "urllib", "wsgiref", "xml", "xmlrpc", "cgi.py", "ftplib.py",
     "imaplib.py", "mailbox.py", "mimetypes.py", "nntplib.py", "poplib.py", "smtplib.py",
     "socket.py", "socketserver.py", "ssl.py", "telnetlib.py", "uuid.py"),
)  # fmt: skip
read_tools = partial(
    read_library_area,
    "tools",
    ("ctypes", "distutils", "ensurepip", "idlelib", "importlib", "lib2to3", "unittest", "venv",
     "ast.py", "bdb.py", "cmd.py", "dis.py", "doctest.py", "inspect.py", "pdb.py", "pkgutil.py",
     "profile.py", "pydoc.py", "timeit.py", "tokenize.py", "trace.py", "traceback.py"),
)  # fmt: skip

read_matplotlib = partial(read_package_docstrings, "matplotlib")
read_networkx = partial(read_package_docstrings, "networkx")
read_ray = partial(read_package_docstrings, "ray")
read_sqlalchemy = partial(read_package_docstrings, "sqlalchemy")
read_sympy = partial(read_package_docstrings, "sympy")
read_torch = partial(read_package_docstrings, "torch")
read_transformers = partial(read_package_docstrings, "transformers")
