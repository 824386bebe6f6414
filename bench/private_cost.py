"""What a private fusion costs its members and its coordinator, beside the pooled one.

    python bench/private_cost.py demo --members 20 --out docs/results/private_cost.md

`demo` is a folder of `molora demo`: its base and its texts are used. Members get blocks of their
own domain and adapters with random weights, for nothing here is about quality; blocks count as
documents. Seconds are taken in one process of one thread, around the members' calls; peak memory is
of processes that do one side's work alone, among so many experts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from private_fusion import keep_private
from safetensors.torch import load_file, save_file

from molora_fed.adapters.save import save_adapter
from molora_fed.charter import Charter, FusionRules
from molora_fed.contributions.contributed import Contributed
from molora_fed.cooperative.cooperative import open_cooperative
from molora_fed.corpus.blocks import Blocks, load_blocks
from molora_fed.fusion.fuse import fuse, fuse_texts
from molora_fed.fusion.local_members import LocalMembers, drop_text
from molora_fed.fusion.plan import FusionPlan
from molora_fed.fusion.private_answers import FusionMember
from molora_fed.fusion.private_texts import Check, Members, PrivateTexts
from molora_fed.fusion.sum_questions import SumQuestion, TextCounts
from molora_fed.fusion.sum_rounds import SumRounds
from molora_fed.models.base import Base
from molora_fed.plugins import get_plugins
from molora_fed.privacy.sums.vectors import Total
from molora_fed.storage.files import hash_bytes, write_bytes, write_json
from molora_fed.testing import build_random_adapter
from molora_fed.types import Split

BLOCKS = {Split.CALIBRATION: 16, Split.HELD_OUT: 16}
RANK = 16
RULES = FusionRules(compare=("evidence",), merges=())
EXPERTS = (5, 10, 20)
SIDES = ("member", "coordinator", "pooled")


class Recording(LocalMembers):
    """Members whose totals are kept in a folder, and how many numbers each answer has."""

    folder: Path
    numbers: dict[str, int]
    comparing: float = 0.0  # processor seconds, of all members

    def _compare(self) -> dict[str, TextCounts]:
        began = time.process_time()
        counts = super()._compare()
        self.comparing = time.process_time() - began
        return counts

    def add_up(self, question: SumQuestion, rounds: SumRounds, check: Check) -> Total:
        """See `Members`."""
        total = super().add_up(question, rounds, check)
        self.numbers[question.place] = rounds.lay_out(question).length
        parts = {name: tensor.contiguous() for name, tensor in total.parts.items()}
        save_file(parts, self.folder / f"{question.place}.safetensors")
        return total


@dataclass
class Kept:
    """What members answered in another process; see `Members`."""

    folder: Path

    def begin(self, plan: FusionPlan) -> Mapping[str, TextCounts]:
        """See `Members`."""
        return self.recount()

    def recount(self) -> Mapping[str, TextCounts]:
        """See `Members`."""
        found = json.loads((self.folder / "counts.json").read_bytes())
        return {name: TextCounts.model_validate(one) for name, one in found.items()}

    def add_up(self, question: SumQuestion, rounds: SumRounds, check: Check) -> Total:
        """See `Members`."""
        names = tuple(json.loads((self.folder / "counts.json").read_bytes()))
        return Total(load_file(self.folder / f"{question.place}.safetensors"), names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder of `molora demo`")
    parser.add_argument("--members", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("docs/results/private_cost.md"))
    parser.add_argument("--side", choices=(*SIDES, "record"), help=argparse.SUPPRESS)
    parser.add_argument("--kept", type=Path, default=Path(), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.side:
        side, count = arguments.side, arguments.members
        print(json.dumps(measure_memory(arguments.demo, side, count, arguments.kept)))
        return
    kept = arguments.out.with_suffix(".json")
    found: dict[str, Any] = json.loads(kept.read_bytes()) if kept.is_file() else {}
    if not found:  # stopped and called again, it goes on
        found = {**measure_seconds(arguments.demo, arguments.members), "memory": {}}
        write_json(kept, found)
        print(json.dumps(found), flush=True)
    for side in SIDES:
        row = found["memory"].setdefault(side, {})
        for count in map(str, EXPERTS):
            if count not in row:
                row[count] = ask_memory(arguments.demo, side, int(count))
                write_json(kept, found)
    write_bytes(arguments.out, build_page(found).encode())
    print(build_page(found))


def open_texts(demo: Path, count: int, folder: Path) -> tuple[Base, Charter, list[Contributed]]:
    """Base, charter, and so many contributions with blocks and adapters."""
    cooperative = open_cooperative(demo / "cooperative")
    base = cooperative.load_base()
    amendment = cooperative.charter.amendment.model_copy(update={"fusion": RULES})
    charter = cooperative.charter.model_copy(update={"amendment": amendment})
    texts = sorted((demo / "contributors").glob("*/corpus"))
    made = []
    for number in range(count):
        corpus = texts[number % len(texts)]
        name = f"member-{number:02d}"
        adapter = build_random_adapter(base.model, kind="lora", seed=number, rank=RANK, name=name)
        save_adapter(adapter, base.model, folder / name)
        blocks = {split: take(corpus, split, number // len(texts)) for split in BLOCKS}
        made.append(
            Contributed(
                id=hash_bytes(name.encode()),
                contributor=name,
                domain=corpus.parent.name,
                adapter=folder / name,
                calibration=blocks[Split.CALIBRATION],
                held_out=blocks[Split.HELD_OUT],
            )
        )
    return base, charter, sorted(made, key=lambda one: one.id)


def take(corpus: Path, split: Split, share: int) -> Blocks:
    """A share of a split's blocks, each a document of its own."""
    blocks = load_blocks(corpus / f"{split}.safetensors").select(
        slice(share * BLOCKS[split], (share + 1) * BLOCKS[split])
    )
    each = np.repeat(np.arange(len(blocks), dtype=np.int32)[:, None], blocks.block_size, axis=1)
    return replace(blocks, documents=each, clusters=each)


def measure_seconds(demo: Path, count: int) -> dict[str, Any]:
    """Processor seconds of both ways, and what the private one sends."""
    plugins = get_plugins()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base, charter, contributions = open_texts(demo, count, folder / "adapters")
        began = time.process_time()
        fuse(base, charter, contributions, folder / "pooled", plugins=plugins)
        pooled = time.process_time() - began
        private = keep_private(charter, "robust")
        experts = [drop_text(one) for one in contributions]
        members = LocalMembers.open(
            base, private, contributions, experts, folder, plugins=plugins
        ).members
        spent: dict[str, float] = dict.fromkeys(members, 0.0)
        asked = Recording(private, watch(members, spent))
        asked.folder, asked.numbers = folder, {}
        began = time.process_time()
        fuse_texts(base, private, PrivateTexts(experts, asked), folder / "here", plugins=plugins)
        whole = time.process_time() - began
        states = [tensor for asking in asked.questions for tensor in asking.state.values()]
        adapters = sum(p.stat().st_size for p in (folder / "adapters").rglob("*") if p.is_file())
    return {
        "members": count,
        "blocks": {str(split): number for split, number in BLOCKS.items()},
        "pooled_seconds": pooled,
        "member_seconds": {
            "mean": float(np.mean(list(spent.values()))),
            "most": max(spent.values()),
        },
        "comparing_seconds": asked.comparing / count,
        "coordinator_seconds": whole - sum(spent.values()) - asked.comparing,
        "numbers": asked.numbers,
        "states_bytes": sum(tensor.numel() * tensor.element_size() for tensor in states),
        "experts_bytes": adapters,
    }


def watch(members: Mapping[str, FusionMember], spent: dict[str, float]) -> dict[str, FusionMember]:
    """The same members; the processor seconds of what they do are added up."""

    @contextmanager
    def timing(name: str) -> Iterator[None]:
        began = time.process_time()
        yield
        spent[name] += time.process_time() - began

    def wrap(name: str, method: Any) -> Any:
        def call(*values: Any, **more: Any) -> Any:
            with timing(name):
                return method(*values, **more)

        return call

    for name, member in members.items():
        for method in ("count", "measure"):
            setattr(member, method, wrap(name, getattr(member, method)))
    return dict(members)


def ask_memory(demo: Path, side: str, count: int) -> dict[str, int]:
    """Peak memory of a process that does one side's work among so many experts, bytes."""
    with tempfile.TemporaryDirectory() as kept:
        found: dict[str, int] = {}
        for each in ("record", side) if side == "coordinator" else (side,):
            command = [sys.executable, __file__, str(demo), "--members", str(count)]
            command += ["--side", each, "--kept", kept]
            found = json.loads(subprocess.check_output(command).splitlines()[-1])
    return found


def measure_memory(demo: Path, side: str, count: int, kept: Path) -> dict[str, int]:
    """Do one side's work; memory before and at its peak, bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base, charter, contributions = open_texts(demo, count, folder / "adapters")
        before = reset_peak()
        if side == "pooled":
            fuse(base, charter, contributions, folder / "pooled", plugins=get_plugins())
            return {"before": before, "peak": read_peak()}
        private = keep_private(charter, "robust")
        experts = [drop_text(one) for one in contributions]
        asked: Members = Kept(kept)
        if side != "coordinator":
            members = LocalMembers.open(
                base, private, contributions, experts, folder, plugins=get_plugins()
            ).members
            chosen = members if side == "record" else dict(list(members.items())[:1])
            asked = Recording(private, chosen)
            asked.folder, asked.numbers = kept, {}
            counts = {name: one.count().model_dump(mode="json") for name, one in chosen.items()}
            write_json(kept / "counts.json", counts)
        texts = PrivateTexts(experts, asked)
        fuse_texts(base, private, texts, folder / "here", plugins=get_plugins())
        return {"before": before, "peak": read_peak()}


def reset_peak() -> int:
    """Count the peak from now on; resident memory now, bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return read_peak()


def read_peak() -> int:
    """Peak resident memory of this process, bytes; `ru_maxrss` would be its parent's, too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def build_page(found: Mapping[str, Any]) -> str:
    """The page of results."""
    seconds = found["member_seconds"]
    share = found["coordinator_seconds"] / found["pooled_seconds"]
    lines = [
        "# What a private fusion costs",
        "",
        f"`python bench/private_cost.py demo --members {found['members']}`; a member holds "
        f"{found['blocks']['calibration']} calibration and {found['blocks']['held-out']} held-out "
        f"blocks; {found['members'] + 1} experts; sums robust. Processor seconds of one thread. Of "
        "masked sums each is some tenths of a second more at the coordinator ([sums](sums.md)).",
        "",
        "| | seconds |",
        "|---|---:|",
        f"| the coordinator of a pooled fusion | {found['pooled_seconds']:.1f} |",
        f"| the coordinator of the private one | {found['coordinator_seconds']:.2f} "
        f"({100 * share:.1f} % of it) |",
        f"| a member, its bank and answers, mean | {seconds['mean']:.2f} |",
        f"| … the member with the most | {seconds['most']:.2f} |",
        f"| a member, comparing held-out text with everybody's, mean | "
        f"{found['comparing_seconds']:.2f} |",
        "",
        f"A member receives {found['experts_bytes']:,} bytes of experts and "
        f"{found['states_bytes']:,} of states, and answers with "
        + ", ".join(f"{n:,} numbers in `{place}`" for place, n in found["numbers"].items())
        + ".",
        "",
        "Peak memory of a process by number of contributors, MB (before the fusion, at its peak); "
        "each is one run:",
        "",
        "| | " + " | ".join(f"{count}" for count in EXPERTS) + " |",
        "|---|" + "---|" * len(EXPERTS),
    ]
    for side, row in found["memory"].items():
        cells = [
            f"{one['before'] / 1e6:.0f}, {one['peak'] / 1e6:.0f}"
            for one in (row[str(count)] for count in EXPERTS)
        ]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
