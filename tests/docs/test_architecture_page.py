"""docs/architecture.md and the README's tree show the folders there are, and who imports whom."""

import re
from pathlib import Path

from import_table import ALLOWED

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
CORE = ROOT / "molora_fed"
FOLDERS = {path.parent.name for path in CORE.glob("*/__init__.py")}


def read_tree(text):
    """The folders and root modules of `molora_fed/` in the code block that shows the tree."""
    block = next(part for part in text.split("```") if "\nmolora_fed/" in part)
    inside = re.findall(r"^  (\S.*?)(?:  .*)?$", block, re.MULTILINE)
    words = [word for line in inside for word in line.split()]
    return {w.strip("/") for w in words if w.endswith("/")}, {w for w in words if w.endswith(".py")}


def read_table():
    """Place and what it may import, with "all above" written out."""
    found = {}
    for place, names in re.findall(r"^\| \d+ \| (\w+) \| (.*?) ?\|$", PAGE, re.MULTILINE):
        listed, _, left_out = names.partition(" but ")
        if listed == "all above":
            found[place] = set(found) - {name.strip() for name in left_out.split(",")}
        else:
            found[place] = {name.strip() for name in names.split(",") if name.strip()}
    return found


def test_both_trees_show_every_folder_and_root_module():
    modules = {path.name for path in CORE.glob("*.py")}
    for text in (PAGE, README):
        folders, shown = read_tree(text)
        assert folders == FOLDERS
        assert shown == modules


def test_the_table_is_the_one_that_is_tested():
    root = {"root", "storage"}
    assert {
        place: set(names.split()) - root for place, names in ALLOWED.items() if place not in root
    } == {place: names for place, names in read_table().items()}


def test_every_file_on_the_way_of_a_contribution_exists():
    way = PAGE.partition("## The way of one contribution")[2]
    files = re.findall(r"`([\w/]+\.py)`", way)
    assert len(files) > 15
    for file in files:
        assert (CORE / file).exists() or (ROOT / file).exists(), file
