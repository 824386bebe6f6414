"""Whether the tests notice planted faults: each fault of planted_faults.toml, one line, by itself.

`python bench/planted_faults.py [--tree DIR] [--only NAME] [--out FILE.md] [--timeout 300]`

The packages and tests of a checkout are copied into a temporary folder, and only the copy is
changed. First all chosen tests must pass there without a fault; then each fault is planted, its own
tests are run, and the file is put back. A fault is caught if one of its tests fails. Run it with a
Python that has the checkout's dependencies and its plugins' entry points installed.

Files move and lines are reworded, so a fault is found by its text in whatever file of the product
holds it, and a test by the name of its function. `old` may be a list of wordings, and `new` then
one for each. A fault whose text or tests are not there is stale: nothing is run, and it is named.
A fault with `since` is skipped where its tests are not there: older code lacks them.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
FAULTS = Path(__file__).with_suffix(".toml")
PRODUCT = ("molora_fed", "cli", "plugins")
BESIDE = ("tests", "contrib", "docs", "bench", "pyproject.toml", "README.md", "CHANGELOG.md")
PRELOADED = (
    "pytest", "hypothesis", "torch", "transformers.pytorch_utils", "transformers.models.gpt_neox",
    "transformers.models.auto.modeling_auto", "peft", "accelerate", "scipy.stats", "flwr.app",
)  # fmt: skip
KEYS = {"name", "breaks", "old", "new", "tests", "since"}
TESTS_FAILED = 1  # pytest's exit status; others say that tests could not be run
SHOWN = 88  # characters of a faulty line in a message


class StaleError(Exception):
    """A fault that cannot be planted in this checkout; the message says why."""


@dataclass(frozen=True)
class Fault:
    """One fault as the list states it.

    Attributes:
        name: Unique in the list.
        breaks: What goes wrong, one sentence.
        wordings: Pairs of the text that stands in the product and what takes its place; the code
            has one of them, once.
        tests: Names of test functions that catch it; at least one exists.
        since: Empty, or the change whose tests first catch it.
    """

    name: str
    breaks: str
    wordings: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]
    since: str


@dataclass(frozen=True)
class Planted:
    """A fault with its place in a checkout.

    Attributes:
        fault: The fault.
        file: File below the checkout that holds its text.
        old: The wording that is there.
        new: What takes its place.
        tests: Node ids of its tests.
    """

    fault: Fault
    file: Path
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What the tests said of one fault.

    Attributes:
        planted: The fault.
        caught_by: The test that failed first; empty if it was not caught.
        trouble: Why it counts as not caught; empty if it was caught.
        seconds: Wall time.
    """

    planted: Planted
    caught_by: str
    trouble: str
    seconds: float


def read_faults(path: Path) -> list[Fault]:
    """The faults of a list.

    Raises:
        ValueError: If an entry is malformed or a name is there twice.
    """
    faults = [_parse_fault(entry) for entry in tomllib.loads(path.read_text())["fault"]]
    names = [fault.name for fault in faults]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path.name}: expected each name once, got {', '.join(twice)} twice")
    return faults


def _parse_fault(entry: Mapping[str, Any]) -> Fault:
    name = str(entry.get("name", "without a name"))
    unknown, missing = entry.keys() - KEYS, KEYS - {"since"} - entry.keys()
    if unknown or missing:
        raise ValueError(f"fault '{name}': unknown {sorted(unknown)}, missing {sorted(missing)}")
    old, new = ([v] if isinstance(v, str) else list(v) for v in (entry["old"], entry["new"]))
    if len(old) != len(new) or not all(old) or any("\n" in text for text in (*old, *new)):
        raise ValueError(f"fault '{name}': expected one line of `new` for each line of `old`")
    if any(a == b for a, b in zip(old, new, strict=True)) or not entry["tests"]:
        raise ValueError(f"fault '{name}': expected a change, and tests that notice it")
    wordings = tuple(zip(old, new, strict=True))
    return Fault(name, entry["breaks"], wordings, tuple(entry["tests"]), entry.get("since", ""))


def read_product(tree: Path) -> dict[Path, str]:
    """Text of every source file of the product, by its path below the checkout."""
    files = (file for part in PRODUCT for file in sorted((tree / part).rglob("*")))
    endings = {".py", ".j2", ".toml", ".json"}
    return {
        file.relative_to(tree): file.read_text(encoding="utf-8")
        for file in files
        if file.suffix in endings and ".egg-info" not in str(file)
    }


def index_tests(tree: Path) -> dict[str, list[str]]:
    """Node ids of every test function by its name."""
    found: dict[str, list[str]] = {}
    for folder in ("tests", "contrib"):
        for file in sorted((tree / folder).rglob("test_*.py")):
            group = ""
            for line in file.read_text(encoding="utf-8").splitlines():
                if match := re.match(r"class (\w+)", line):
                    group = f"{match[1]}::"
                elif match := re.match(r"( *)(?:async )?def (test_\w+)\(", line):
                    inside = group if match[1] else ""
                    node = f"{file.relative_to(tree).as_posix()}::{inside}{match[2]}"
                    found.setdefault(match[2], []).append(node)
    return found


def place(fault: Fault, product: Mapping[Path, str], tests: Mapping[str, list[str]]) -> Planted:
    """Find a fault's text and tests in a checkout.

    Raises:
        StaleError: If its text is not there exactly once, or none of its tests is there.
    """
    hits = [
        (file, old, new)
        for old, new in fault.wordings
        for file, text in product.items()
        for _ in range(text.count(old))
    ]
    if len(hits) != 1:
        texts = " or ".join(f"`{old[:SHOWN]}`" for old, _ in fault.wordings)
        where = ", ".join(
            f"{file}:{number}"
            for file, old in dict.fromkeys((file, old) for file, old, _ in hits)
            for number, line in enumerate(product[file].splitlines(), 1)
            if old in line
        )
        raise StaleError(
            f"expected {texts} exactly once in {', '.join(PRODUCT)}, got "
            f"{f'{len(hits)} places: {where}' if hits else 'none'}. Correct `old` and `new`, or add"
            " the new wording to them as a list."
        )
    nodes = tuple(node for name in fault.tests for node in tests.get(name, ()))
    if not nodes:
        raise StaleError(
            f"expected a test called {' or '.join(fault.tests)}, got none. Add its new name to "
            "`tests`."
        )
    return Planted(fault, *hits[0], nodes)


def copy_tree(tree: Path, target: Path) -> None:
    """Copy what tests need of a checkout, without results, caches and virtual environments."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*_cache", ".venv", "results")
    for name in (*PRODUCT, *BESIDE):
        source = tree / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=ignore)
        elif source.exists():
            shutil.copy2(source, target / name)


def run_pytest(
    folder: Path, paths: Sequence[str], arguments: Sequence[str], output: Path, stop: bool
) -> None:
    """Run pytest in this process, its output in a file; ends the process with pytest's status."""
    os.setsid()  # so that what tests start can be ended with it
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    sys.path[:0] = paths
    sys.dont_write_bytecode = stop
    status = int(pytest.main([*arguments]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Copy:
    """A copy of a checkout in which faults are planted, one at a time.

    Tests run in processes forked from one that has the large libraries loaded, and nothing of the
    product: importing them takes longer than most tests.
    """

    def __init__(self, tree: Path, folder: Path, timeout: float) -> None:
        self._tree = tree
        self._folder = folder.resolve()
        self._timeout = timeout
        copy_tree(tree, folder)
        self._paths = [str(self._folder / part) for part in ("", "cli", "plugins")]
        os.environ["PYTHONPATH"] = os.pathsep.join(self._paths)  # for processes that tests start
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # A progress bar of the preloaded libraries keeps a semaphore for good.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*PRELOADED])

    def check_imported(self) -> None:
        """Refuse to go on if tests would import another copy of the product.

        Raises:
            RuntimeError: If a package is found elsewhere.
        """
        names = ("molora_fed", "molora_cli", "molora_kalavai")
        code = f"import {', '.join(names)}; print(*({', '.join(f'{n}.__file__' for n in names)},))"
        command = [sys.executable, "-c", code]
        found = subprocess.run(command, cwd=self._folder, capture_output=True, text=True)
        foreign = [f for f in found.stdout.split() if not Path(f).is_relative_to(self._folder)]
        if found.returncode or foreign:
            raise RuntimeError(
                f"expected the copy to be imported, got {foreign or found.stderr[-500:]}"
            )

    def run(self, tests: Sequence[str], *, stop: bool = True) -> tuple[int | None, str]:
        """Run tests.

        Args:
            tests: Node ids.
            stop: Whether to stop at the first failure, and to keep no bytecode: that of a planted
                file may be of the same size and second as that of the right one.

        Returns:
            Pytest's exit status, None if out of time, and its output.
        """
        arguments = ["-q", "-p", "no:cacheprovider", "--tb=line", *(["-x"] if stop else [])]
        arguments += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of preloaded modules
        output = self._folder / "pytest-output.txt"
        process = self._context.Process(
            target=run_pytest,
            args=(self._folder, self._paths, [*arguments, *dict.fromkeys(tests)], output, stop),
        )
        process.start()
        process.join(self._timeout if stop else None)
        if process.is_alive():
            with suppress(ProcessLookupError):
                os.killpg(int(str(process.pid)), signal.SIGKILL)
            process.join()
            return None, ""
        return process.exitcode, output.read_text(encoding="utf-8", errors="replace")

    def try_fault(self, planted: Planted) -> Outcome:
        """Plant a fault, run its tests, and put the file back."""
        file = self._folder / planted.file
        text = file.read_text(encoding="utf-8")
        started = time.perf_counter()
        try:
            file.write_text(text.replace(planted.old, planted.new), encoding="utf-8")
            status, output = self.run(planted.tests)
        finally:
            shutil.copy2(self._tree / planted.file, file)
        seconds = time.perf_counter() - started
        failed = re.search(r"^(?:FAILED|ERROR) (\S+?)(?:\[.*)?(?: - .*)?$", output, re.MULTILINE)
        if status == TESTS_FAILED and failed:
            return Outcome(planted, failed[1].partition("::")[2], "", seconds)
        if status is None:
            trouble = f"no end within {self._timeout:.0f} s"
        elif status == 0:
            trouble = "all its tests pass"
        else:
            trouble = f"pytest ended with {status}: {' '.join(output.split())[-200:]}"
        return Outcome(planted, "", trouble, seconds)


def describe_tree(tree: Path) -> str:
    """The commit of a checkout, marked if files differ from it."""
    commands = (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", *PRODUCT, "tests"])
    found = [
        subprocess.run(["git", "-C", str(tree), *command], capture_output=True, text=True)
        for command in commands
    ]
    if any(one.returncode for one in found):
        return "a folder without git"
    return found[0].stdout.strip() + (" with changes" if found[1].stdout.strip() else "")


def build_report(tree: Path, outcomes: Sequence[Outcome], skipped: Sequence[str]) -> str:
    """The outcomes as Markdown, without paths of this machine."""
    caught = sum(not one.trouble for one in outcomes)
    lines = [
        f"# Planted faults: {caught} of {len(outcomes)} caught",
        "",
        f"Commit {describe_tree(tree)}. "
        "`python bench/planted_faults.py --tree CHECKOUT --out FILE.md`",
        "",
        "Each fault is one line of the product, changed in a copy; then its tests are run (without "
        "any fault they pass). `bench/planted_faults.toml` has the lines.",
        "",
        "| fault | breaks | file | caught by | seconds |",
        "|---|---|---|---|---:|",
    ]
    for one in outcomes:
        verdict = f"`{one.caught_by}`" if not one.trouble else f"NOT CAUGHT: {one.trouble}"
        fault, file = one.planted.fault, one.planted.file.as_posix()
        cells = (fault.name, fault.breaks, f"`{file}`", verdict, f"{one.seconds:.1f}")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if skipped:
        lines += ["", f"Not in this code, as their tests are newer: {', '.join(skipped)}."]
    return "\n".join([*lines, ""])


def place_all(
    faults: Sequence[Fault], tree: Path, console: Console
) -> tuple[list[Planted], list[str]]:
    """Find all faults; returns those found, and the names of newer ones that are not there.

    Raises:
        SystemExit: If any other fault is stale; all are named.
    """
    product, tests = read_product(tree), index_tests(tree)
    found: list[Planted] = []
    skipped: list[str] = []
    stale = 0
    for fault in faults:
        if fault.since and not any(name in tests for name in fault.tests):
            skipped.append(fault.name)
            continue
        try:
            found.append(place(fault, product, tests))
        except StaleError as error:
            stale += 1
            console.print(f"[red]STALE[/] {fault.name}: ", end="")
            console.print(str(error), markup=False, soft_wrap=True)
    if stale:
        console.print(f"Cannot plant {stale} of {len(faults)} faults; nothing was run.")
        raise SystemExit(2)
    return found, skipped


def main() -> int:
    """Run the faults; 0 if all are caught, 1 if one is not, 2 if they cannot be run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tree", type=Path, default=REPOSITORY, help="checkout to judge")
    parser.add_argument("--only", action="append", metavar="NAME", help="this fault; repeatable")
    parser.add_argument("--out", type=Path, help="Markdown file for the outcomes")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one fault")
    options = parser.parse_args()
    console = Console()
    faults = read_faults(FAULTS)
    unknown = sorted({*(options.only or ())} - {fault.name for fault in faults})
    if unknown:
        parser.error(f"unknown fault {', '.join(unknown)}; see {FAULTS.name}")
    chosen = [one for one in faults if not options.only or one.name in options.only]
    tree = options.tree.resolve()
    planted, skipped = place_all(chosen, tree, console)
    with tempfile.TemporaryDirectory(prefix="planted-faults-") as folder:
        copy = Copy(tree, Path(folder), options.timeout)
        copy.check_imported()
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        outcomes: list[Outcome] = []
        with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
            task = progress.add_task("tests without a fault", total=len(planted) + 1)
            status, output = copy.run([node for one in planted for node in one.tests], stop=False)
            if status != 0:
                console.print(output[-4_000:], markup=False)
                console.print("Cannot judge faults: the chosen tests do not pass without any.")
                return 2
            for one in planted:
                progress.update(task, description=one.fault.name, advance=1)
                outcomes.append(copy.try_fault(one))
                print_outcome(console, outcomes[-1])
            progress.update(task, description="done", advance=1)
    if options.out is not None:
        options.out.write_text(build_report(tree, outcomes, skipped), encoding="utf-8")
    return summarise(console, outcomes, skipped)


def print_outcome(console: Console, outcome: Outcome) -> None:
    verdict = "[red]NOT CAUGHT[/]" if outcome.trouble else "[green]caught[/]"
    detail = outcome.trouble or outcome.caught_by
    console.print(f"{verdict} {outcome.planted.fault.name}: ", end="")
    console.print(f"{detail} ({outcome.seconds:.1f} s)", markup=False, soft_wrap=True)


def summarise(console: Console, outcomes: Sequence[Outcome], skipped: Sequence[str]) -> int:
    missed = [one for one in outcomes if one.trouble]
    table = Table(title="Planted faults", title_justify="left", show_header=False)
    table.add_row("caught", str(len(outcomes) - len(missed)))
    table.add_row("not caught", str(len(missed)))
    if skipped:
        table.add_row("skipped, newer than this code", ", ".join(skipped))
    console.print(table)
    for one in missed:
        console.print(f"{one.planted.file}: `{one.planted.old[:SHOWN]}`", markup=False)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
