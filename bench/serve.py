"""Speed and memory of serving: a fused model beside its base, PEFT and plain loops.

    python bench/serve.py --demo FOLDER --study real-base --out docs/results/serve.json   # hours
    python bench/serve.py --quick --out FILE.json             # small sizes, few rounds
    python bench/serve.py --out FILE.json --cells smollm2/float32/E4 memory
    python bench/serve.py --out FILE.json --page              # only the page and the figure again

The whole is made of cells, `--list` names them. Each is kept in the JSON as soon as it is done, and
a run that is started again goes on with those that lack; `--again` measures the chosen ones anew.
Page and figure are written beside the JSON after each run.

- `speed/BASE/DTYPE/E<E>/B<B>`: all sides continue the same B random texts, one after the other in
  one process and so again in every round. Prefill: seconds to the first token. Decoding: the median
  over the tokens of a run. A ratio is taken within a round, to the faster of the two bases over all
  rounds; its median and 10th to 90th percentile over rounds are shown. Of the fastest tokens of all
  rounds, which neighbours on the machine disturb least, the bars show the ratio, too.
  At batch 1 a run writes 96 tokens, so that the median of a sparse side is of tokens that its one
  expert writes merged, as it does after 32 (`FusedForCausalLM.merge_after`); so of the side that
  merges all experts by the gates after the prompt.
- `sampling/...`: the same with temperature 0.8 and top_p 0.95.
- `memory/...`: each side in a process of its own, the peak above what its imports took, while it
  reads the prompts and writes a few tokens; of an accelerator its peak.
- `limit/...`: bytes a token must read, operations, calls, and how fast this machine reads and
  multiplies, measured in the same process.
- `quality/...`: see bench/serve_quality.py; of the built-in base with `--demo FOLDER`, a folder of
  `molora demo`, of SmolLM2 with `--study real-base`, once its first specialists are trained.

E counts the base as an expert; the others are LoRA adapters of rank 16 on all linear layers with
random numbers. The router is on in everything that mixes experts: it gives each text of a batch
another favourite, so that sparse texts keep several adapters at once, and never the base alone.
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from serve_limits import list_needs, measure_calls, measure_machine, read_shape
from serve_page import build_page, compare, draw_page, find_base
from serve_quality import measure_quality, open_demo, open_study
from serve_sides import (
    BLENDED,
    DENSE,
    DRAWN,
    IN_TURN,
    MERGED,
    OF_ANY_COUNT,
    ONE_PASS,
    OWN,
    PLAIN,
    ROWS,
    SIDES,
    SPARSE,
    SPECIALIST,
    Timing,
    Workshop,
    open_base,
)

from molora_fed.models.runtime import choose_placement, describe_environment
from molora_fed.storage.compute import Compute
from molora_fed.storage.files import write_bytes, write_json

REPOSITORY = Path(__file__).resolve().parents[1]
BASES = ("smollm2", "builtin")
DTYPES = ("float32", "bfloat16")
COUNTS = (4, 8, 2)  # those with a bar first
BATCHES = (1, 4, 16)
PROMPTS = {"smollm2": 128, "builtin": 64}
NEW_TOKENS = {1: 96, 4: 16, 16: 8}
LEAST_ROUNDS = 3
SLOW = (ROWS, IN_TURN, MERGED)
"""Sides that write a quarter of the tokens, which leaves time for more rounds."""
IN_ORDER = (PLAIN, OWN, DENSE, SPARSE, BLENDED, SPECIALIST, ONE_PASS, *SLOW)
"""In a round what is compared with a bar runs close together."""
SEED = 42


@dataclass(frozen=True)
class Cell:
    """What is measured at once."""

    kind: str
    base: str
    dtype: str = ""
    experts: int = 0
    batch: int = 0

    @property
    def name(self) -> str:
        """Its key in the JSON."""
        parts = [self.kind, self.base, self.dtype]
        parts += [
            f"E{self.experts}" if self.experts else "",
            f"B{self.batch}" if self.batch else "",
        ]
        return "/".join(filter(None, parts))

    @property
    def sides(self) -> tuple[str, ...]:
        """What is compared: of memory, sides that do not depend on E are in the cells of E = 1."""
        if self.kind == "sampling":
            return (*IN_ORDER, DRAWN)
        if self.kind != "memory":
            return IN_ORDER
        if self.experts == 1:
            return OF_ANY_COUNT
        return tuple(side for side in SIDES if side not in OF_ANY_COUNT)


def list_cells(quick: bool) -> list[Cell]:
    """All cells, those of one model one after the other; the bars' first."""
    counts = (4,) if quick else COUNTS
    batches = (1, 4) if quick else BATCHES
    cells = []
    for base in BASES:
        for dtype in DTYPES:
            for experts in counts:
                cells += [Cell("speed", base, dtype, experts, batch) for batch in batches]
                cells.append(Cell("limit", base, dtype, experts))
                if experts == 4:
                    cells.append(Cell("sampling", base, dtype, experts, 1))
    cells += [Cell("quality", base) for base in BASES]
    for base in BASES:
        for dtype in DTYPES:
            for experts in (1, *counts):
                for batch in (1, 16) if not quick else (1,):
                    cells.append(Cell("memory", base, dtype, experts, batch))
    return cells


class Bench:
    """Measures cells; the workshop of the last one is kept while it fits."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self._workshop: tuple[tuple[str, str, int], Workshop] | None = None

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Everything a cell says, for JSON."""
        measures: dict[str, Callable[[Cell], dict[str, Any]]] = {
            "speed": self.measure_speed,
            "sampling": self.measure_speed,
            "memory": self.measure_memory,
            "limit": self.measure_limit,
            "quality": self.measure_quality,
        }
        load, start = os.getloadavg()[0], time.perf_counter()
        found = measures[cell.kind](cell)
        return {**found, "load": round(load, 1), "seconds": round(time.perf_counter() - start, 1)}

    def open(self, cell: Cell) -> Workshop:
        """The sides of a cell's base and number of experts."""
        key = (cell.base, cell.dtype, cell.experts)
        if self._workshop is None or self._workshop[0] != key:
            self._workshop = None
            gc.collect()
            asked = Compute.model_validate({"dtype": cell.dtype, "device": self.arguments.device})
            base = open_base(cell.base, choose_placement(asked), self.arguments.base)
            self._workshop = (key, Workshop(base, max(cell.experts, 2)))
        return self._workshop[1]

    def make_prompt(self, cell: Cell, workshop: Workshop) -> torch.Tensor:
        """Random texts (B, P)."""
        model = workshop.base.model
        generator = torch.Generator().manual_seed(SEED)
        shape = (cell.batch or 1, PROMPTS[cell.base])
        tokens = torch.randint(0, model.config.vocab_size, shape, generator=generator)
        return tokens.to(model.device)

    def measure_speed(self, cell: Cell) -> dict[str, Any]:
        """Seconds of every side in every round."""
        workshop, arguments = self.open(cell), self.arguments
        prompt = self.make_prompt(cell, workshop)
        new = NEW_TOKENS[cell.batch] // (2 if arguments.quick else 1)
        sampled = cell.kind == "sampling"
        names = [name for name in cell.sides if workshop.allows(name, *prompt.shape)]
        sides = {name: workshop.make(name) for name in names}
        found: dict[str, list[Timing]] = {name: [] for name in names}
        for side in sides.values():
            side.run(prompt, 4, sampled=sampled)
        start = time.perf_counter()
        for turn in range(arguments.rounds):
            if turn >= LEAST_ROUNDS and time.perf_counter() - start > arguments.seconds:
                break
            for name, side in sides.items():
                torch.manual_seed(SEED + turn)
                count = max(new // 4, 4) if name in SLOW else new
                found[name].append(side.run(prompt, count, sampled=sampled))
            print(".", end="", flush=True)
        text = found[DENSE][0].text
        return {
            "prompt": prompt.shape[1],
            "new": new,
            "sides": {
                name: {
                    "prefill": [timing.prefill for timing in timings],
                    "token": [statistics.median(timing.tokens) for timing in timings],
                    "fastest": min(min(timing.tokens) for timing in timings),
                    "same_tokens_as_dense": compute_share(timings[0].text, text),
                }
                for name, timings in found.items()
            },
        }

    def measure_limit(self, cell: Cell) -> dict[str, Any]:
        """Needs, calls and the machine's speeds, for one text."""
        workshop = self.open(cell)
        prompt, model = self.make_prompt(cell, workshop), workshop.base.model
        context = prompt.shape[1] + NEW_TOKENS[1] // 2
        needs = list_needs(read_shape(model), cell.experts, context)
        calls = measure_calls(workshop, prompt)
        return {
            "machine": measure_machine(model.device, model.dtype),
            "sides": {name: {**asdict(need), "calls": calls[name]} for name, need in needs.items()},
        }

    def measure_quality(self, cell: Cell) -> dict[str, Any]:
        """Loss of deciding once, on a fused model of the study's or the demo's specialists."""
        given = self.arguments
        opened = open_study(given.study) if cell.base == "smollm2" else open_demo(given.demo)
        return measure_quality(*opened, most=20 if given.quick else 200)

    def measure_memory(self, cell: Cell) -> dict[str, Any]:
        """Peak of every side, each in a process of its own."""
        arguments, peaks = self.arguments, {}
        self._workshop = None
        gc.collect()
        for side in cell.sides:
            command = [
                sys.executable, __file__, "--base", str(arguments.base), "--device",
                arguments.device, "--threads", str(torch.get_num_threads()), "--child", side,
                "--cells", cell.name,
            ]  # fmt: skip
            if arguments.quick:
                command.append("--quick")
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise SystemExit(f"Cannot measure {cell.name}: '{side}' failed: {last}")
            peaks[side] = json.loads(done.stdout.splitlines()[-1])
        return {"sides": peaks}

    def measure_own_memory(self, cell: Cell, name: str) -> int | None:
        """What a child prints: bytes above its imports, with everything that serving holds."""
        before = read_status("VmRSS")
        workshop = self.open(cell)
        prompt = self.make_prompt(cell, workshop)
        if not workshop.allows(name, *prompt.shape):
            return None
        side = workshop.make(name)
        side.run(prompt, 2, sampled=False)
        workshop.adapters.clear()  # every side has its own copy by now
        gc.collect()
        if prompt.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        side.run(prompt, 4, sampled=False)
        if prompt.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated())
        return read_status("VmHWM") - before


def compute_share(text: torch.Tensor, other: torch.Tensor) -> float:
    """Share of equal tokens of two texts (B, N), as far as the shorter one goes."""
    length = min(text.shape[1], other.shape[1])
    return float((text[:, :length] == other[:, :length]).float().mean())


def read_status(key: str) -> int:
    """Bytes that /proc says of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{key}:")[1].split()[0])


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for cells of one file."""
    device = choose_placement(Compute(device=arguments.device)).device.type
    return {
        "quick": arguments.quick,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "environment": describe_environment(device),
    }


def read_kept(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The cells of a former run.

    Raises:
        SystemExit: If it was another machine, or other settings.
    """
    if not path.exists():
        return {}
    kept = json.loads(path.read_text(encoding="utf-8"))
    if kept["settings"] != settings:
        differ = [key for key, value in settings.items() if kept["settings"].get(key) != value]
        raise SystemExit(
            f"Cannot go on with '{path}': expected the same {', '.join(differ)}, got "
            f"{[settings[key] for key in differ]}. Choose another --out, or move the file."
        )
    cells: dict[str, Any] = kept["cells"]
    return cells


def choose_cells(arguments: argparse.Namespace) -> list[Cell]:
    """Those with one of `--cells` among the parts of their names, and that can be measured."""
    cells = list_cells(arguments.quick)
    if arguments.demo is None:
        cells = [cell for cell in cells if cell != Cell("quality", "builtin")]
    if arguments.study is None:
        cells = [cell for cell in cells if cell != Cell("quality", "smollm2")]
    if arguments.cells:
        parts = arguments.cells
        cells = [c for c in cells if any(f"/{part}/" in f"/{c.name}/" for part in parts)]
    return cells


def tell(cell: Cell, found: dict[str, Any]) -> str:
    """A few words on what came out."""
    if cell.kind not in ("speed", "sampling"):
        return ""
    sides = found["sides"]
    base = find_base(sides)
    dense, sparse = (compare(sides, name, base, "token") for name in (DENSE, SPARSE))
    return f"dense {dense}, sparse {sparse} of '{base}'"


def write_pages(out: Path, report: dict[str, Any]) -> None:
    """Page and figure beside the JSON."""
    served = out.with_name("api_load.json")
    load = json.loads(served.read_text(encoding="utf-8")) if served.exists() else None
    figure = out.with_suffix(".svg")
    figures = draw_page(report)
    if figures is not None:
        write_bytes(figure, figures)
    page = build_page(report, load, figure.name if figures is not None else None)
    write_bytes(out.with_suffix(".md"), page.encode())


def parse_arguments(values: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="docs/results/serve.json")
    parser.add_argument("--quick", action="store_true", help="E = 4, batches 1 and 4, few rounds")
    parser.add_argument("--cells", nargs="+", help="only those with one of these in their names")
    parser.add_argument("--again", action="store_true", help="measure chosen cells once more")
    parser.add_argument("--list", action="store_true", help="name the cells")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    parser.add_argument("--base", type=Path, default=REPOSITORY / "bases" / "smollm2")
    parser.add_argument("--demo", type=Path, help="folder of a demo, for `quality/builtin`")
    parser.add_argument("--study", help="a finished study, for `quality/smollm2`: real-base")
    parser.add_argument("--device", default="auto", help="an accelerator where there is one")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--rounds", type=int, help="at most; 12, with --quick 3")
    parser.add_argument("--seconds", type=float, default=90.0, help="of a cell's rounds, about")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(values)
    if arguments.rounds is None:
        arguments.rounds = 3 if arguments.quick else 12
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    cells, bench = choose_cells(arguments), Bench(arguments)
    if arguments.child:
        (cell,) = (cell for cell in cells if cell.name == arguments.cells[0])
        print(json.dumps(bench.measure_own_memory(cell, arguments.child)))
        return
    settings = describe(arguments)
    kept = read_kept(arguments.out, settings) if arguments.out else {}
    report = {"settings": settings, "cells": kept}
    for number, cell in enumerate(cells, 1):
        is_done = cell.name in kept and not arguments.again
        if arguments.list:
            print(cell.name, "(done)" if is_done else "")
        if arguments.list or arguments.page or is_done:
            continue
        print(f"[{number}/{len(cells)}] {cell.name} ", end="", flush=True)
        found = bench.measure(cell)
        kept[cell.name] = found
        if arguments.out:
            write_json(arguments.out, report)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f" {found['seconds']} s. {tell(cell, found)} (peak {peak:.1f} GiB)", flush=True)
    if arguments.list:
        return
    if arguments.out and kept:
        write_pages(arguments.out, report)
    elif not arguments.out:
        print(build_page(report, None, None))


if __name__ == "__main__":
    main()
