"""`molora plugins new`: a whole package for a plugin, with its test, ready to be installed.

Packages are made of the samples in templates/, which are code that runs: what names a sample is
exchanged for the names of the plugin. Of text files that all packages have, `$words` are filled in.
"""

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from email.utils import parseaddr
from importlib.metadata import distributions
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from molora_fed.errors import ConfigError, describe_mismatch

__all__ = ["KINDS", "new"]

KINDS: Mapping[str, str] = {
    "router": "routers",
    "adapter-router": "adapter_routers",
    "operator": "lifecycle_operators",
    "scope": "fitness_scopes",
    "predictor": "gain_predictors",
    "check": "admission_checks",
    "domain": "domains",
    "kind": "adapter_kinds",
    "carried-file": "carried_files",
    "merge": "merges",
    "extractor": "extractors",
    "judge": "judges",
    "policy": "escalation_policies",
    "task-family": "task_families",
    "command": "commands",
}
"""What `--kind` takes, and which hook registers it."""

TEMPLATES = Path(__file__).parent / "templates"
MAX_NAME = 24
"""Characters; lines of the samples are so much shorter than a line may be."""

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_SHARED = {
    "pyproject.txt": "pyproject.toml",
    "readme.md": "README.md",
    "gitignore": ".gitignore",
    "test.yml": ".github/workflows/test.yml",
}
"""Files that all packages have, in templates/package, and what they are called there."""


@dataclass(frozen=True)
class _Names:
    """How a sample is called, and how the plugin.

    Attributes:
        kind: Of `KINDS`.
        name: What is registered.
    """

    kind: str
    name: str

    @property
    def distribution(self) -> str:
        return f"molora-{self.name}"

    @property
    def module(self) -> str:
        return self.distribution.replace("-", "_")

    @property
    def sample(self) -> str:
        """Module of the sample."""
        return f"molora_sample_{self.kind.replace('-', '_')}"

    @property
    def filled_in(self) -> str:
        """The file, of the sample and of the package, that has what an author fills in."""
        found = (path.name for path in (TEMPLATES / self.sample).glob("*.py"))
        return next(name for name in found if name != "__init__.py")

    def rename(self, text: str) -> str:
        """Text of a sample with the names of the plugin; of a path, too."""
        noun, stem = (_join_capitalised(words) for words in (self.kind, self.name))
        stem = stem.removesuffix(noun) or stem  # LastWordsRouter of "last-words-router", too
        words = {
            self.sample: self.module,
            f"sample-{self.kind}": self.name,
            self.sample.removeprefix("molora_"): self.name.replace("-", "_"),
        }
        # In one go: the plugin's own name may hold a sample's.
        text = re.sub("|".join(words), lambda found: words[found[0]], text)
        return re.sub(r"\bSample(?=[A-Z])", stem, text)


def _join_capitalised(words: str) -> str:
    return "".join(word.capitalize() for word in words.split("-"))


def new(
    name: Annotated[str, typer.Argument(help="What it will be called in a charter: last-words.")],
    kind: Annotated[str, typer.Option(help=f"What it is: {', '.join(KINDS)}.")],
    folder: Annotated[
        Path | None, typer.Option(help="Folder to make; molora-NAME here if not given.")
    ] = None,
    author: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its author, or 'NAME <ADDRESS>'.")
    ] = None,
) -> None:
    """Write a package for a plugin: one method to fill in, its tests, how it is used."""
    names = _Names(kind, name)
    target = folder or Path(names.distribution)
    noun = _check_new(names, target)
    authors = "" if author is None else _write_authors(author)
    files = dict(_list_files(names, noun, authors))

    from molora_fed.storage.files import replace_folder

    with replace_folder(target) as temporary:
        for path, text in files.items():
            file = temporary / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    where = shlex.quote(str(target))
    print(f"package      {names.distribution} in {target}")
    print(f"fill in      {target / names.module / names.filled_in}")
    print("Then:")
    print(f"    pip install -e {shlex.quote(f'{target}[dev]')}")
    print(f"    python -m pytest {where}")
    print(*_find_use(names), sep="\n")


def _list_files(names: _Names, noun: str, authors: str) -> Iterator[tuple[str, str]]:
    """Path and text of every file of the package."""
    under = names.kind.replace("-", "_")
    own = [f"{names.sample}/{file}" for file in ("__init__.py", names.filled_in)]
    for path in [*own, f"tests/test_sample_{under}.py"]:
        file = TEMPLATES / path
        yield names.rename(path), names.rename(file.read_text(encoding="utf-8"))
    yield f"{names.module}/py.typed", ""
    words = {
        "name": names.name,
        "distribution": names.distribution,
        "module": names.module,
        "noun": noun,
        "page": KINDS[names.kind].replace("_", "-"),
        "file": names.filled_in,
        "authors": authors,
        "use": _read_use(names),
    }
    for source, path in _SHARED.items():
        text = (TEMPLATES / "package" / source).read_text(encoding="utf-8")
        yield path, Template(text).substitute(words)


def _read_use(names: _Names) -> str:
    return names.rename((TEMPLATES / "use" / f"{names.kind}.md").read_text(encoding="utf-8"))


def _find_use(names: _Names) -> list[str]:
    """The first lines of code in how it is used."""
    found: list[str] = []
    for line in _read_use(names).splitlines():
        if line.startswith("    "):
            found.append(line)
        elif found:
            break
    return found


def _check_new(names: _Names, target: Path) -> str:
    """Refuse what could not be made, installed or registered; the noun of the kind otherwise.

    Raises:
        ConfigError: If the kind is unknown, the name malformed or taken, or the folder there.
    """
    kind, name = names.kind, names.name
    what = f"Cannot make plugin '{name}'"
    if kind not in KINDS:
        near = get_close_matches(kind, KINDS, n=1)
        fix = f"Did you mean --kind {near[0]}?" if near else "Choose one with --kind."
        expected = f"a kind among {', '.join(KINDS)}"
        raise ConfigError(describe_mismatch(what, expected=expected, got=f"'{kind}'", fix=fix))
    is_well_formed = _NAME.fullmatch(name) and len(name) <= MAX_NAME
    if not is_well_formed or name.startswith("molora-"):
        expected = f"lower-case words joined by dashes, at most {MAX_NAME} characters"
        fix = "Write e.g. last-words; molora- is put before it."
        raise ConfigError(describe_mismatch(what, expected=expected, got=f"'{name}'", fix=fix))

    from molora_fed.plugins import get_plugins

    registry = get_plugins().registries()[KINDS[kind]]
    if name in registry.names():
        got = f"one of {registry.entry(name).origin}"
        expected = f"a name that no {registry.kind} has"
        raise ConfigError(
            describe_mismatch(what, expected=expected, got=got, fix="Choose another name.")
        )
    taken = {one.name.lower().replace("_", "-") for one in distributions() if one.name}
    if names.distribution in taken or importlib.util.find_spec(names.module) is not None:
        got = f"'{names.module}', which can be imported already"
        fix = "Choose another name, or uninstall that one."
        expected = "a package that is not installed"
        raise ConfigError(describe_mismatch(what, expected=expected, got=got, fix=fix))
    if target.exists() or target.is_symlink():
        expected = "a folder that is not there"
        fix = "Choose another one with --folder."
        raise ConfigError(describe_mismatch(what, expected=expected, got=f"'{target}'", fix=fix))
    return registry.kind


def _write_authors(author: str) -> str:
    """The line of pyproject.toml.

    Raises:
        ConfigError: If it is not one line of text.
    """
    name, address = parseaddr(author)
    if "@" not in address:
        name, address = author, ""
    if not author.strip() or not author.isprintable():
        raise ConfigError(
            describe_mismatch(
                "Cannot name the author",
                expected="a name, or 'NAME <ADDRESS>'",
                got=repr(author),
                fix="Correct --author.",
            )
        )
    parts = {"name": name.strip(), "email": address}
    # JSON's texts of printable characters are TOML's, too.
    said = [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in parts.items() if v]
    return f"authors = [{{ {', '.join(said)} }}]\n"
