"""Lines and files of every folder of the product, and how many lines are copies of others.

    python bench/layout.py --tree CHECKOUT     # any version; this one if left out

A copy is a run of six or more lines that stands in two places, spaces and blank lines aside;
imports, closing brackets and docstrings' section titles do not count. Every line of such a run
counts once wherever it stands, the first place included.
"""

import argparse
import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

WINDOW = 6
PRODUCT = ("molora_fed", "cli", "plugins", "contrib")
_PASSED = {
    ")",
    "]",
    "}",
    "):",
    "},",
    "],",
    "),",
    "Args:",
    "Returns:",
    "Raises:",
    "Attributes:",
    '"""',
}


def list_files(tree: Path) -> list[Path]:
    """Python files of the product."""
    found = (path for part in PRODUCT for path in (tree / part).rglob("*.py"))
    return sorted(path for path in found if "tests" not in path.parts)


def name_place(path: Path, tree: Path) -> str:
    """The folder that a file counts for."""
    parts = path.relative_to(tree).parts
    if parts[0] == "molora_fed":
        return f"molora_fed/{parts[1]}" if len(parts) > 2 else "molora_fed (root)"
    studies = [part for part in parts if "studies" in part]
    return "studies" if studies or "study" in parts[-1] else "/".join(parts[:2])


def list_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of the lines that count."""
    source = path.read_text(encoding="utf-8")
    passed = {
        number
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    for number, line in enumerate(source.splitlines(), start=1):
        text = " ".join(line.split())
        if text and text not in _PASSED and number not in passed:
            yield number, text


def find_copies(files: list[Path]) -> set[tuple[Path, int]]:
    """File and number of every line in a run that stands in two places."""
    places: dict[tuple[str, ...], list[tuple[Path, tuple[int, ...]]]] = defaultdict(list)
    for path in files:
        lines = list(list_lines(path))
        for start in range(len(lines) - WINDOW + 1):
            run = lines[start : start + WINDOW]
            places[tuple(text for _, text in run)].append((path, tuple(n for n, _ in run)))
    several = (found for found in places.values() if len(found) > 1)
    return {(path, n) for found in several for path, numbers in found for n in numbers}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="a checkout")
    tree = parser.parse_args().tree
    files = list_files(tree)
    copies = find_copies(files)
    rows: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for path in files:
        row = rows[name_place(path, tree)]
        row[0] += 1
        row[1] += len(path.read_text(encoding="utf-8").splitlines())
        row[2] += sum(one == path for one, _ in copies)
    print(f"{'folder':<28}{'files':>7}{'lines':>8}{'copied':>8}")
    for place, (count, lines, copied) in sorted(rows.items()):
        print(f"{place:<28}{count:>7}{lines:>8}{copied:>8}")
    whole = [sum(row[column] for row in rows.values()) for column in range(3)]
    print(f"{'in all':<28}{whole[0]:>7}{whole[1]:>8}{whole[2]:>8}")


if __name__ == "__main__":
    main()
