"""Domains that need no download, wide and narrow: text that every machine with this package has."""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path

from molora_fed.corpus.sizes import choose_evenly
from molora_fed.errors import CorpusError
from molora_fed.types import Document

__all__ = [
    "AREA_CHARACTERS",
    "DEFAULT_DOMAINS",
    "MIN_CHARACTERS",
    "choose_documents",
    "is_sized",
    "list_sources",
    "read_concurrency",
    "read_cpp",
    "read_docstrings",
    "read_header_family",
    "read_headers",
    "read_headers_of_c10",
    "read_headers_of_python",
    "read_library_area",
    "read_matplotlib",
    "read_network",
    "read_networkx",
    "read_package_docstrings",
    "read_python",
    "read_ray",
    "read_readme",
    "read_science",
    "read_sources",
    "read_sqlalchemy",
    "read_sympy",
    "read_tools",
    "read_torch",
    "read_transformers",
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
# A fixed list, not whatever is installed: a dependency added later must not change the built-in
# base and every figure measured with it. These are the distributions that the first published
# figures were made with; this project's own page would tie the text to its version.
_DESCRIBED = frozenset(
    {"accelerate", "alembic", "annotated-doc", "annotated-types", "anyio", "ast_serialize",
     "attrs", "certifi", "cffi", "charset-normalizer", "click", "contourpy", "cryptography",
     "cycler", "datasketch", "execnet", "fastapi", "filelock", "flwr", "fonttools", "fsspec",
     "greenlet", "grpcio", "grpcio-health-checking", "h11", "hf-xet", "httpcore", "httpcore2",
     "httptools", "httpx", "httpx2", "huggingface_hub", "hypothesis", "idna", "iniconfig",
     "iterators", "jinja2", "jsonschema", "jsonschema-specifications", "kiwisolver", "librt",
     "mako", "markdown-it-py", "markupsafe", "matplotlib", "mdurl", "mpmath", "msgpack", "mypy",
     "mypy_extensions", "networkx", "numpy", "numpy-typing-compat", "optype", "packaging",
     "pathspec", "peft", "pillow", "pip", "pluggy", "prompt_toolkit", "protobuf", "psutil",
     "pyarrow", "pycparser", "pycryptodome", "pydantic", "pydantic_core", "pygments", "pyparsing",
     "pytest", "pytest-xdist", "python-dateutil", "python-dotenv", "pyyaml", "ray", "referencing",
     "regex", "requests", "rich", "rpds-py", "ruff", "safetensors", "scipy", "scipy-stubs",
     "setuptools", "shellingham", "sortedcontainers", "sqlalchemy", "starlette", "sympy",
     "tokenizers", "tomli", "tomli_w", "torch", "tqdm", "transformers", "truststore", "typer",
     "types-jsonschema", "types-psutil", "typing-inspection", "typing_extensions", "tzdata",
     "urllib3", "uv", "uvicorn", "uvloop", "watchfiles", "wcwidth", "websockets"}
)  # fmt: skip
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
    """Long descriptions (usually the README) of the listed distributions, each once."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        # `metadata.json` keeps the description whether it came as a body or as a header.
        fields = distribution.metadata.json
        name = str(fields.get("name", "")).lower()
        if name in _DESCRIBED:
            found.setdefault(name, str(fields.get("description", "")))
    for name, text in sorted(found.items()):
        yield Document(f"description/{name}", text)


def read_readme() -> Iterator[Document]:
    """Long descriptions of a fixed list of distributions, and Python's language reference.

    Raises:
        CorpusError: If there are neither.
    """
    documents = [
        document
        for document in (*_read_descriptions(), *_read_topics())
        if len(document.text) >= MIN_CHARACTERS
    ]
    return choose_documents(documents, "readme", "the listed distributions")


DEFAULT_DOMAINS = ("cpp", "python", "readme", "science")
"""Built-in domains every machine has text for; the built-in base is trained on these."""


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
