"""Bad input to `molora evolve`, and an evolution that is killed: one line each, nothing half-done.

    python bench/bad_population.py --out docs/results/evolution/bad_input.md    # two minutes

Runs real commands on a tiny cooperative in a temporary folder, like bench/bad_input.py. Exits with
1 if any case misbehaves.
"""

import argparse
import math
import signal
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from bad_input import report, run_stage
from bad_input_stage import Outcome, Stage, wait_until
from safetensors.numpy import load_file, save_file

from molora_fed.storage.files import hash_file

COMMAND = "python bench/bad_population.py --out docs/results/evolution/bad_input.md"
DYING = (
    '[{name="death",options={threshold=9.0,patience=1,min_age=1}},{name="slot-reallocation"},'
    '{name="inheritance"}]'
)
RULES = {
    "fusion.mode": "population",
    "population.generations": "2",
    "population.start_steps": "3",
    "population.steps": "2",
    "population.slots": "3",
    "population.rank": "2",
    "population.filling": "fresh",
    "population.lifecycle": DYING,
}
POPULATION_FILES = ("population.safetensors", "router.safetensors")


def amend(folder: str, **changes: str) -> str:
    """Arguments that amend a cooperative's population."""
    parts = " ".join(f"--set population.{key}={value}" for key, value in changes.items())
    return f"coop amend {folder} {parts}"


def prepare(stage: Stage) -> None:
    """A cooperative whose mode is a population, with two contributions; and one without any."""
    stage.prepare()
    rules = " ".join(f"--set {key}={value}" for key, value in RULES.items())
    stage.copy("coop", "bare")
    stage.expect(f"coop admit coop {' '.join(f'trained-{d}' for d in ('abc', 'xyz'))}")
    for folder in ("coop", "bare"):
        stage.expect(f"coop amend {folder} {rules}")


def run_cases(stage: Stage) -> Iterator[Outcome]:
    """Run every case on a prepared stage."""
    yield stage.refuse("empty population", "nobody contributed", "evolve bare", 10)
    yield stage.refuse("rank 0", "of the slots", amend("coop", rank="0"), 11, says=("rank",))
    yield from run_rank_zero_adapter(stage)
    yield from run_rule_cases(stage)
    yield from run_one_domain(stage)
    yield from run_slot_cases(stage)
    yield from run_killed(stage)


def run_rank_zero_adapter(stage: Stage) -> Iterator[Outcome]:
    """An adapter whose low-rank factors have no rank, signed by its contributor."""
    stage.expect(
        "coop create low --base base --folder low --kind lora --steps 4 --block-size 32 "
        "--expected 1 --privacy pooled"
    )
    stage.expect(
        "train --cooperative low --domain abc --data texts-abc --out flat --threads 1 --name abc-1"
    )
    path = stage.root / "flat" / "contribution" / "adapter" / "adapter_model.safetensors"
    empty = {
        name: np.empty((0, value.shape[1]) if "lora_A" in name else (value.shape[0], 0), np.float32)
        for name, value in load_file(path).items()
    }
    save_file(empty, path)
    stage.sign_again(stage.root / "flat" / "contribution")
    yield stage.refuse("rank 0", "of an adapter", "coop admit low flat", 22)


def run_rule_cases(stage: Stage) -> Iterator[Outcome]:
    """Rules that cannot be used: said before anything is trained."""
    refused = (  # by the amendment already
        ("a router", {"router": "nosuch"}, 61),
        ("a fitness scope", {"scope": "nosuch"}, 61),
        ("an operator", {"lifecycle": '[{name="nosuch"}]'}, 61),
        ("an operator's option", {"lifecycle": '[{name="death",options={x=1}}]'}, 40),
    )
    for how, changes, code in refused:
        yield stage.refuse("unknown names", how, amend("coop", **changes), code)
    unusable = (
        ("too little guard data", "60 generations, fresh documents", {"generations": "60"}),
        ("fewer slots than contributions", "one slot for two", {"slots": "1"}),
    )
    for number, (case, how, changes) in enumerate(unusable):
        folder = f"rules-{number}"
        stage.copy("coop", folder)
        stage.expect(amend(folder, **changes))
        absent = (f"{folder}/evolution/evolved",)
        yield stage.refuse(case, how, f"evolve {folder}", 40, absent=absent)


def run_one_domain(stage: Stage) -> Iterator[Outcome]:
    """Fitness per domain of one domain alone."""
    stage.copy("bare", "single")
    stage.expect("coop admit single trained-abc")
    arguments = "evolve single"
    yield stage.refuse("one domain only", "fitness per domain", arguments, 40, says=("domain",))


def run_slot_cases(stage: Stage) -> Iterator[Outcome]:
    """An evolved model that was damaged afterwards, and one that was not."""
    stage.copy("coop", "done")
    stage.expect("evolve done")
    for how, tamper in (("a slot with NaN", poison), ("a truncated file", halve)):
        folder = f"done-{tamper.__name__}"
        stage.copy("done", folder)
        (path,) = (stage.root / folder / "evolution" / "evolved").rglob("population.safetensors")
        tamper(path)
        arguments = f"generate {folder}/evolution --prompt ab --max-new-tokens 2"
        yield stage.refuse("damaged population", how, arguments, 20)


def poison(path: Path) -> None:
    """In place: the file keeps its size and its header."""
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(struct.pack("<f", math.nan))


def halve(path: Path) -> None:
    """Cut the file's second half off."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def run_killed(stage: Stage) -> Iterator[Outcome]:
    """Killed in the middle of a generation and run again: the bytes of an undisturbed run."""
    stage.copy("coop", "killed")
    there = stage.list_files()
    process = stage.start("evolve killed", log="killed")
    first = stage.root / "killed" / "evolution" / "generations" / "0000" / "generation.json"
    wait_until(first.is_file, "the first generation")
    process.send_signal(signal.SIGKILL)
    process.wait()
    code = process.returncode
    stage.expect("evolve killed")
    outcome = stage.build_outcome(
        "killed evolution", "SIGKILL after generation 0, then again", "evolve killed",
        (code, -signal.SIGKILL), "", there=there, lines=0,
    )  # fmt: skip
    for name in POPULATION_FILES:
        found = [
            hash_file(next((stage.root / folder / "evolution" / "evolved").rglob(name)))
            for folder in ("done", "killed")
        ]
        if len(set(found)) != 1:
            outcome.problems.append(f"{name} differs from that of an undisturbed run")
    outcome.note = "population and router have the bytes of an undisturbed run"
    yield outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="Markdown page to write")
    arguments = parser.parse_args()
    outcomes = run_stage(prepare, run_cases)
    return report(outcomes, "Bad input to an evolution", COMMAND, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
