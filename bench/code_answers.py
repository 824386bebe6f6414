"""Runs every program that tries to get out of the sandbox, and writes what became of it.

`python bench/code_answers.py --out FILE.md [--repeats 3]`

Beside each program: what stopped it and at which system call, the processes and files it left, and
whether every repeat gave the same report. At the end the time of an answer that behaves.
"""

import argparse
import platform
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from molora_acar.hostile_programs import PROGRAMS, HostileProgram
from molora_acar.sandbox import Limits, Report, run_function

from molora_fed.storage.files import write_bytes

LIMITS = Limits(cpu_seconds=1, wall_seconds=30.0, memory_bytes=128 * 2**20, result_bytes=2**16)
SLEEP_SECONDS = 2.0
LEAVINGS = ("/tmp/molora-hostile", "/tmp2", "/hostile", "hostile")
GOOD = "def f(a, b):\n    return sorted([a, b])[0] + b"


@dataclass(frozen=True)
class Trial:
    """What became of a program.

    Attributes:
        program: The program.
        report: Of its last run.
        same: Whether all runs were stopped for the same reason at the same call.
        left: Processes and files found afterwards that were not there before.
        seconds: Of the longest run.
    """

    program: HostileProgram
    report: Report
    same: bool
    left: int
    seconds: float

    @property
    def held(self) -> bool:
        """Whether it was stopped for what it must be, and left nothing."""
        return self.report.stopped in self.program.stopped and self.left == 0


def try_program(program: HostileProgram, repeats: int) -> Trial:
    limits = replace(LIMITS, wall_seconds=SLEEP_SECONDS) if "sleep" in program.name else LIMITS
    reports, times = [], []
    before = look_around()
    for _ in range(repeats):
        start = time.monotonic()
        reports.append(run_function(program.source, "f", [[]], limits))
        times.append(time.monotonic() - start)
    left = len(look_around() - before)
    same = len({(one.compiled, one.stopped, one.call) for one in reports}) == 1
    return Trial(program, reports[-1], same, left, max(times))


def look_around() -> set[str]:
    """Processes below this one, and what the programs tried to make."""
    processes = {str(one.pid) for one in psutil.Process().children(recursive=True)}
    return processes | {path for path in LEAVINGS if Path(path).exists()}


def describe(trial: Trial) -> str:
    report = trial.report
    if not report.compiled:
        became = "no program, no answer"
    elif report.stopped is None:
        became = f"went on: `{report.outcomes[0]}`"
    else:
        became = f"stopped: {report.stopped}"
    call = f"`{report.call}`" if report.call else ""
    cells = (trial.program.name, became, call, "yes" if trial.same else "no", str(trial.left))
    return f"| {' | '.join(cells)} | {trial.seconds:.2f} |"


def time_answers(count: int) -> list[float]:
    """Seconds of each of `count` well-behaved answers with six tests."""
    times = []
    for number in range(count):
        start = time.monotonic()
        run_function(f"{GOOD} + {number}", "f", [[place, 3] for place in range(6)], LIMITS)
        times.append(time.monotonic() - start)
    return times


def compose(trials: list[Trial], times: list[float], command: str) -> str:
    held = sum(one.held for one in trials)
    rows = "\n".join(describe(one) for one in trials)
    machine = f"Linux {platform.release()} on {platform.machine()}"
    limits = (
        f"{LIMITS.cpu_seconds} s of processor, {LIMITS.memory_bytes >> 20} MiB of address space, "
        f"{LIMITS.result_bytes >> 10} KiB of results"
    )
    middle, slowest = 1000 * statistics.median(times), 1000 * max(times)
    return f"""# Code answers that misbehave

`{command}`

{machine}, Python {platform.python_version()}. Limits here: {limits}, and by the clock
{LIMITS.wall_seconds:g} s, {SLEEP_SECONDS:g} s for the program that sleeps.

**{held} of {len(trials)} programs ended as they must** and left no process and no file.

| program | what became of it | at the call | every run alike | left behind | seconds |
|---|---|---|---|---|---|
{rows}

"Processes" counts threads and signals too. A program that goes on did nothing that reaches outside:
what it did is an exception, or no Python at all. The seconds are of the longest of the runs, start
of the process included, on a machine that did other work at the same time.

An answer of six tests that behaves takes {middle:.0f} ms (median of {len(times)}, the slowest
{slowest:.0f} ms).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    trials = [try_program(program, options.repeats) for program in PROGRAMS]
    command = f"python bench/code_answers.py --out {options.out} --repeats {options.repeats}"
    page = compose(trials, time_answers(40), command)
    write_bytes(options.out, page.encode())
    print(page)
    if not all(one.held for one in trials):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
