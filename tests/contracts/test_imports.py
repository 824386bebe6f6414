"""Imports point down: every import, lazy and type-only ones too, is in tests/import_table.py.

`docs/architecture.md` shows the same table, see tests/docs/test_architecture_page.py.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from import_table import ALLOWED, PACKAGES, REPOSITORY

import molora_fed

MAX_CHAIN = 14  # folders on the longest way down
MAX_ROOT_MODULES = 9
MAX_LINES = 500  # of a file
FACE = molora_fed._MODULE_OF


def find_place(module: str) -> str:
    """The folder of the core, or the package, that a module belongs to."""
    if module == "molora_fed.__init__":
        return "face"
    package, _, rest = FACE.get(module.removeprefix("molora_fed."), module).partition(".")
    if package != "molora_fed":
        return package
    folder = rest.partition(".")[0]
    return folder if (PACKAGES["molora_fed"] / folder).is_dir() and folder else "root"


def list_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything of this project that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in found if name.partition(".")[0] in PACKAGES)


def list_arrows() -> Iterator[tuple[str, str, str]]:
    """Every import between two places: from, to, and where it stands."""
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            relative = path.relative_to(folder).with_suffix("")
            place = find_place(".".join((package, *relative.parts)))
            for line, name in list_imports(path):
                if find_place(name) != place:
                    yield place, find_place(name), f"{path.relative_to(REPOSITORY)}:{line}"


ARROWS = tuple(list_arrows())


@pytest.mark.parametrize("place", sorted({*ALLOWED, *(arrow[0] for arrow in ARROWS)}))
def test_a_place_imports_only_what_the_table_allows(place):
    allowed = {"root", "storage", *ALLOWED[place].split()}
    wrong = [f"{at} imports {to}" for source, to, at in ARROWS if source == place]
    wrong = [line for line in wrong if line.rpartition(" ")[2] not in allowed]
    assert not wrong, "\n".join(wrong)


def test_the_table_has_no_circle_and_its_longest_chain_is_short():
    arrows = {place: set() for place in ALLOWED}
    for source, to, _ in ARROWS:
        if to != "root":  # everything stands on the root's modules, and `charter` on storage
            arrows[source].add(to)
    depth = {}
    waiting = dict(arrows)
    while waiting:
        ready = [place for place, below in waiting.items() if below <= depth.keys()]
        assert ready, f"a circle among {sorted(waiting)}"
        for place in ready:
            below = waiting.pop(place) - {"root", "storage"}
            depth[place] = 1 + max((depth[each] for each in below), default=1)
    assert max(depth.values()) <= MAX_CHAIN


def test_every_allowed_arrow_names_a_place():
    assert {name for names in ALLOWED.values() for name in names.split()} < ALLOWED.keys()


def test_few_modules_stand_at_the_root():
    assert len(list(PACKAGES["molora_fed"].glob("*.py"))) <= MAX_ROOT_MODULES


def test_a_name_of_the_face_is_placed_where_it_lives():
    assert find_place("molora_fed.OutputRouter") == "routing"
    assert (
        find_place("molora_fed.hookimpl") == find_place("molora_fed.errors.MoloraError") == "root"
    )


def test_every_test_file_has_a_name_of_its_own():
    """Two of one name cannot be collected in one run, though each passes alone."""
    files = sorted(path for path in (REPOSITORY / "tests").rglob("test_*.py"))
    by_name: dict[str, list[str]] = {}
    for path in files:
        by_name.setdefault(path.name, []).append(str(path.relative_to(REPOSITORY)))
    assert [same for same in by_name.values() if len(same) > 1] == []


def test_no_file_is_too_long_to_be_read_at_once():
    files = [path for folder in PACKAGES.values() for path in folder.rglob("*.py")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    long = {f"{path.relative_to(REPOSITORY)}": n for path, n in lengths.items() if n > MAX_LINES}
    assert long == {}
