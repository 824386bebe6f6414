"""Seconds to fit each router on a real bank, in turn in one process.

    molora study routers            # makes the bank
    python bench/fit_routers.py     # reads it again

Every fit starts from the bank's columns alone, pooling of states included; routers take turns, so
that all see the same machine. Seconds are processor time on one thread, beside wall time.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from molora_studies.framework.fusions import open_fusion
from molora_studies.framework.store import TaskStore
from molora_studies.kalavai.routers import RoutersOptions, RoutersStudy

from molora_fed.storage.files import write_json
from molora_fed.storage.values import find_cache_folder
from molora_fed.types import Reading

OUT = Path("docs/results/kalavai/fit_routers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT, help="written with .json and .md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = RoutersStudy.plan(RoutersOptions())[0].task
    store = TaskStore.in_cache(find_cache_folder())
    needs = tuple(store.read(need)[0] for need in task.needs)
    fusion = open_fusion(task.settings, needs, store.folder(task))
    routers = fusion.choose_routers()
    readings: frozenset[Reading] = frozenset({"evidence"}).union(
        *(router.reads(options) for router, options in routers.values())
    )
    bank = fusion.build_calibration_bank(readings)
    processor: dict[str, list[float]] = {label: [] for label in routers}
    wall: dict[str, list[float]] = {label: [] for label in routers}
    for repeat in range(arguments.repeats):
        for label, (router, options) in routers.items():
            fresh = replace(bank, _derived={})
            started, used = time.monotonic(), time.process_time()
            router.fit(fresh, options, repeat)
            processor[label].append(time.process_time() - used)
            wall[label].append(time.monotonic() - started)
    result: dict[str, Any] = {
        "blocks": bank.num_blocks,
        "block_size": bank.block_size,
        "hidden_size": bank.hidden_size,
        "experts": bank.num_experts,
        "repeats": arguments.repeats,
        "seconds": {"processor": processor, "wall": wall},
    }
    write_json(arguments.out.with_suffix(".json"), result)
    page = summarize(result)
    arguments.out.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


def summarize(result: dict[str, Any]) -> str:
    processor, wall = result["seconds"]["processor"], result["seconds"]["wall"]
    reference = statistics.median(processor["linear"])
    lines = [
        "# Seconds to fit a router",
        "",
        f"`python bench/fit_routers.py` on the bank of `molora study routers`, seed 42: "
        f"{result['blocks']} calibration blocks of {result['block_size']} tokens, D = "
        f"{result['hidden_size']}, {result['experts']} experts, one thread; median of "
        f"{result['repeats']} fits that take turns, smallest to largest in brackets. Each fit",
        "starts from the bank's columns, so that pooling states is in it.",
        "",
        "| router | processor seconds | of `linear` | wall seconds |",
        "|---|---|---|---|",
    ]
    for label in sorted(processor, key=lambda name: statistics.median(processor[name])):
        ratio = statistics.median(processor[label]) / reference
        lines.append(f"| {label} | {show(processor[label])} | {ratio:.2f} | {show(wall[label])} |")
    return "\n".join(lines) + "\n"


def show(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} [{min(seconds):.2f}, {max(seconds):.2f}]"


if __name__ == "__main__":
    main()
