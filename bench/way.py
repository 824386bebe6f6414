"""The way of `molora fuse` through the product's files: how often it goes from one into another.

    python bench/way.py                                        # the tables
    python bench/way.py --out docs/results/rebuild/way-after.txt

A cooperative of a tiny base admits three contributions and fuses them, once to load everything
that is imported on the way and once, in another folder, under a profile hook (every thread). The
hook sees each call of a Python function and each return. Only files of the product's packages
count: other libraries and generated code are passed over.

- entry: a call of a function in a place (a file, or a folder) other than the last one seen.
- move: an entry, or a return into a place other than the last one seen.
- step: a different pair of places (from, to) among the entries: entries without repeats, so that
  neither the size of the data nor the steps of a fit count.
- stop: a file, where it is entered for the first time. Between two stops the folder may change;
  a change to a folder that an earlier stop was in is a return.


A folder is that of a package (`molora_fed/bank`); files at the root of `molora_fed` are one folder
in the first count and a folder each in the second.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from molora_cli.main import run

PACKAGES = (
    "molora_fed",
    "molora_cli",
    "molora_kalavai",
    "molora_evolution",
    "molora_acar",
    "molora_studies",
)
DOMAINS = {"abc": "lora", "xyz": "svd", "lmn": "delta"}
SIZES = ("--block-size", "32", "--rank", "2", "--steps", "4", "--privacy", "pooled")
SAMPLES = ("samples.calibration=8", "samples.admission=4", "samples.held_out=8")


def find_roots() -> dict[str, str]:
    """Folders of the installed packages, with a separator at the end, and their names."""
    roots = {}
    for package in PACKAGES:
        with contextlib.suppress(ModuleNotFoundError):
            module = __import__(package)
            roots[str(Path(module.__file__ or "").parent) + os.sep] = package
    return roots


def name_folder(file: str, *, split_root: bool = False) -> str:
    """Folder of a product file; those at a package's root are its `(root)`, or one each."""
    package, *inner = file.split("/")
    if len(inner) > 1:
        return f"{package}/{inner[0]}"
    return file if split_root else f"{package} (root)"


@dataclass
class Way:
    """What the hook saw of one thread after another.

    Attributes:
        visits: Product files in the order seen, without repeats of neighbours; whether each was
            called (True) or returned into.
    """

    roots: dict[str, str]
    visits: list[tuple[str, bool]] = field(default_factory=list)
    names: dict[str, str | None] = field(default_factory=dict)

    def name(self, path: str) -> str | None:
        """A product file's name, e.g. "molora_fed/bank/build.py"; None for any other file."""
        if path not in self.names:
            inside = (
                f"{package}/{path.removeprefix(root)}"
                for root, package in self.roots.items()
                if path.startswith(root) and path.endswith(".py")
            )
            self.names[path] = next(inside, None)
        return self.names[path]

    def watch(self, frame: FrameType, event: str, _: Any) -> None:
        """The profile hook."""
        if event == "return":
            found = frame.f_back
            while found is not None and self.name(found.f_code.co_filename) is None:
                found = found.f_back
            if found is None or self.name(frame.f_code.co_filename) is None:
                return
            frame = found
        elif event != "call":
            return
        file = self.name(frame.f_code.co_filename)
        if file is not None and (not self.visits or self.visits[-1][0] != file):
            self.visits.append((file, event == "call"))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch this thread and those that start inside."""
        threading.setprofile(self.watch)
        sys.setprofile(self.watch)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]


def molora(*arguments: object) -> str:
    """Run a command in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = run([str(argument) for argument in arguments])
    if code:
        raise SystemExit(f"molora {arguments[0]} ended with {code}: {out.getvalue()}")
    return out.getvalue()


def write_text(path: Path, letters: str, seed: int) -> Path:
    """Documents of words made from a few letters, one JSON line each."""
    source = random.Random(seed)
    words = ["".join(source.choices(letters, k=source.randint(2, 6))) for _ in range(99)]
    lines = [json.dumps({"text": " ".join(source.choices(words, k=12))}) for _ in range(120)]
    path.write_text("\n".join(lines) + "\n")
    return path


def prepare(folder: Path) -> tuple[Path, list[Path]]:
    """A cooperative, and the folders of three contributions to it."""
    from molora_fed.testing import models

    models.build_tiny_checkpoint(folder / "tiny", "gpt_neox")
    cooperative = folder / "cooperative"
    molora("coop", "create", "way", "--base", folder / "tiny", "--folder", cooperative, *SIZES)
    amend = [part for setting in SAMPLES for part in ("--set", setting)]
    molora("coop", "amend", cooperative, *amend, "--set", "admission.max_loss_rise=9.0")
    trained = []
    for seed, (domain, kind) in enumerate(DOMAINS.items()):
        text = write_text(folder / f"{domain}.jsonl", domain, seed)
        wanted = ["--cooperative", cooperative, "--domain", domain, "--kind", kind]
        wanted += ["--data", text, "--out", folder / domain, "--threads", 1]
        molora("train", *wanted, "--name", domain)
        trained.append(folder / domain)
    return cooperative, trained


def list_entries(
    visits: list[tuple[str, bool]], fold: Callable[[str], str]
) -> list[tuple[str | None, str]]:
    """Calls into another place than the last one seen: (from, to), in order."""
    entries: list[tuple[str | None, str]] = []
    last = None
    for file, is_call in visits:
        place = fold(file)
        if is_call and place != last:
            entries.append((last, place))
        last = place
    return entries


def list_stops(visits: list[tuple[str, bool]]) -> list[str]:
    """Files in the order in which they are first entered."""
    return list(dict.fromkeys(file for file, is_call in visits if is_call))


def count_returns(stops: list[str], fold: Callable[[str], str]) -> tuple[int, int]:
    """Folder changes along the stops, and how many of them go to a folder that was left before."""
    changes = returns = 0
    seen: set[str] = set()
    last = None
    for file in stops:
        folder = fold(file)
        if folder != last:
            changes += 1
            returns += folder in seen
            seen.add(folder)
        last = folder
    return changes, returns


def describe(way: Way) -> str:
    """The tables."""
    visits = way.visits
    levels: dict[str, Callable[[str], str]] = {
        "file": lambda file: file,
        "folder": name_folder,
        "folder, root files one each": lambda file: name_folder(file, split_root=True),
    }
    lines = ["level                         places    moves  entries    steps"]
    entries = {level: list_entries(visits, fold) for level, fold in levels.items()}
    for level, fold in levels.items():
        places = [fold(file) for file, _ in visits]
        moves = 1 + sum(one != other for one, other in itertools.pairwise(places))
        counts = (len(set(places)), moves, len(entries[level]), len(set(entries[level])))
        lines.append(f"{level:<28}" + "".join(f"{count:>8} " for count in counts).rstrip())
    stops = list_stops(visits)
    for what, some in {
        "all packages": stops,
        "molora_fed alone": [file for file in stops if file.startswith("molora_fed/")],
    }.items():
        lines += ["", f"{what}: {len(some)} stops"]
        for level, fold in list(levels.items())[1:]:
            changes, returns = count_returns(some, fold)
            lines.append(f"  {level}: {changes} changes, {returns} returns")
    for level, found in entries.items():
        lines += ["", f"entries (steps)  {level}"]
        counted = Counter(place for _, place in found)
        steps = Counter(place for _, place in set(found))
        ranked = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
        lines += [f"{count:>7} {f'({steps[place]})':>5}  {place}" for place, count in ranked]
    lines += ["", "stops"]
    lines += [f"{number:>5}  {file}" for number, file in enumerate(stops, start=1)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the tables there")
    arguments = parser.parse_args()
    way = Way(find_roots())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cooperative, trained = prepare(folder)
        again = folder / "again"
        shutil.copytree(cooperative, again)
        molora("fuse", "--cooperative", cooperative, *trained)
        with way.watching():
            molora("fuse", "--cooperative", again, *trained)
    text = describe(way)
    print(text, end="")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(f"$ python bench/way.py --out {arguments.out}\n\n{text}")


if __name__ == "__main__":
    main()
