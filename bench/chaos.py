"""Disturbs whole federations at random: killed, stopped, cut off, out of space, with wrong clocks.

    python bench/chaos.py                                     # 40 federations, 200 faults; hours
    python bench/chaos.py --federations 2 --faults 8 --out /tmp/faults   # a short look

Every federation is real commands on copies of the same homes, with faults drawn from `--seed` and
its number. It has to end with the fused model at all members, byte for byte that of the undisturbed
run, with every acknowledged upload in the ledger and nothing left running. Each that is finished is
a line in `runs.jsonl`, and is not run again: stopped and called again, it goes on with the others.
What failed is kept with the ends of its logs, and makes the exit status 1; `--only` runs it again.
"""

import argparse
import itertools
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "faults")]

from fault_stage import MEMBERS, SERVER, Stage  # noqa: E402
from faults import draw_faults  # noqa: E402
from federation import FederationRun, prepare_stage  # noqa: E402

from molora_fed.federation.supervise import sigterm_as_interrupt  # noqa: E402

LONGEST_SECONDS = 90.0
PAGE = """# Faults

`{command}`: {federations} federations of a server and {members} members,
{faults} faults, seed {seed}. Every federation is `molora serve` and `molora join` on copies of
the same homes, through a relay of ours; it counts if all members end with the fused model,
with the bytes of the undisturbed run, with every acknowledged upload in the ledger and nothing left
running or half-written.

{outcome}

{kinds}

Met something: a process of that side or the server's, or a line in use. Said so: the command named
in one line what it waited for, while the fault lasted; what is over before it is seen needs none.
Commands that ended with one line, and went on when the same command was given again: {ends}.
Seconds of a federation: {shortest:.0f} to {longest:.0f}, undisturbed {undisturbed:.0f}.
{failures}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--federations", type=int, default=40)
    parser.add_argument("--faults", type=int, default=200, help="at least so many, in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=LONGEST_SECONDS, help="of a SIGSTOP")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of federations, run again")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "results" / "faults")
    parser.add_argument("--work", type=Path, help="homes and copies; a temporary folder else")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    work = arguments.work or Path(tempfile.mkdtemp(prefix="molora-faults-"))
    try:
        with sigterm_as_interrupt():
            sys.exit(run_all(arguments, work))
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)


def run_all(arguments: argparse.Namespace, work: Path) -> int:
    """Run the federations that are missing, and write the page.

    Returns:
        The exit status.
    """
    stage = Stage(work / "stage")
    if not stage.is_prepared:
        prepare_stage(stage, work / "undisturbed")
    kept = arguments.out / "runs.jsonl"
    runs = read_runs(kept)
    for number in arguments.only or ():
        runs.pop(number, None)  # the later line counts
    num_faults = -(-arguments.faults // arguments.federations)
    for number in arguments.only or itertools.count():
        met = count_met(runs.values())
        if not arguments.only and number >= arguments.federations and met >= arguments.faults:
            break
        if number in runs:
            continue
        run = run_one(stage, work / f"run-{number}", number, num_faults, arguments)
        with kept.open("a", encoding="utf-8") as file:
            line = json.dumps(run, sort_keys=True).replace(f"{work}/", "")  # nobody's business
            file.write(line + "\n")
        runs[number] = run
        failed = sum(bool(one["problems"]) for one in runs.values())
        met = count_met(runs.values())
        print(
            f"{len(runs)} of {arguments.federations} federations, {met} faults, {failed} failed; "
            f"number {number}: {run['outcome']} in {run['seconds']:.0f} s "
            f"{'; '.join(run['problems'])[:300]}",
            flush=True,
        )
    page = write_page(runs, arguments, stage.seconds)
    (arguments.out.parent / f"{arguments.out.name}.md").write_text(page, encoding="utf-8")
    return int(any(run["problems"] for run in runs.values()))


def read_runs(path: Path) -> dict[int, dict[str, Any]]:
    """The federations that are finished, by number; a line that broke off counts as none."""
    found = {}
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            run = json.loads(line)
        except ValueError:
            continue
        found[run["number"]] = run
    if path.exists():
        whole = "".join(json.dumps(run, sort_keys=True) + "\n" for run in found.values())
        path.write_text(whole, encoding="utf-8")
    return found


def count_met(runs: Iterable[dict[str, Any]]) -> int:
    """How many faults met a process or a line."""
    return sum(bool(fault["met"]) for run in runs for fault in run["faults"])


def run_one(
    stage: Stage, root: Path, number: int, num_faults: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One federation with its faults; what its logs say is kept if it failed."""
    seed = f"{arguments.seed}-{number}"
    faults = draw_faults(
        random.Random(seed), num_faults, tuple(MEMBERS), longest_seconds=arguments.longest
    )
    with FederationRun(stage, root, faults, seed=number) as run:
        found = {"number": number, "seed": seed, **run.run()}
        if found["problems"]:
            folder = arguments.out / "failures"
            folder.mkdir(exist_ok=True)
            text = json.dumps(found, indent=1) + "\n" + run.read_tails()
            (folder / f"{number}.log").write_text(text, encoding="utf-8")
    run.forget()
    return found


def write_page(
    runs: dict[int, dict[str, Any]], arguments: argparse.Namespace, undisturbed: float
) -> str:
    """The page of results: how many of each kind, and what became of their federations."""
    done, met, said, failed = (Counter[str]() for _ in range(4))
    ends = [len(lines) for run in runs.values() for lines in run["ends"].values()]
    for run in runs.values():
        for fault in run["faults"]:
            kind = f"{fault['kind']} {'server' if fault['side'] == SERVER else 'member'}"
            kind += f": {fault['role']}" if fault["role"] else ""
            done[kind] += 1
            met[kind] += bool(fault["met"])
            said[kind] += bool(fault["said"])
            failed[kind] += bool(run["problems"])
    rows = ["| fault | how many | met something | said so | in federations that failed |"]
    rows += ["| --- | ---: | ---: | ---: | ---: |"]
    rows += [
        f"| {kind} | {done[kind]} | {met[kind]} | {said[kind] or '-'} | {failed[kind]} |"
        for kind in sorted(done)
    ]
    bad = {number: run for number, run in sorted(runs.items()) if run["problems"]}
    seconds = [run["seconds"] for run in runs.values()] or [0.0]
    return PAGE.format(
        command=f"python bench/chaos.py --federations {arguments.federations} "
        f"--faults {arguments.faults} --seed {arguments.seed}",
        federations=len(runs),
        members=len(MEMBERS),
        faults=sum(done.values()),
        seed=arguments.seed,
        outcome=f"Published: {len(runs) - len(bad)} of {len(runs)}. "
        f"Faults that met a living process or line: {sum(met.values())}.",
        kinds="\n".join(rows),
        ends=sum(ends),
        shortest=min(seconds),
        longest=max(seconds),
        undisturbed=undisturbed,
        failures="".join(
            f"\n- number {number}: {'; '.join(run['problems'])[:500]}"
            for number, run in bad.items()
        ),
    )


if __name__ == "__main__":
    main()
