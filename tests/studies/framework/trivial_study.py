"""A study of sums, whose tasks leave traces, wait, fail and die on demand; for tests only."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from molora_studies.framework.contract import (
    Cell,
    Claim,
    Figure,
    Study,
    StudyOptions,
    Summary,
    Table,
    Task,
)
from pydantic import Field

ACTIONS = "trivial_study"


def add(settings, context):
    """The sum of a number and of all needs; leaves a line for every time it ran."""
    with (context.folder / "runs.txt").open("a") as file:
        file.write(f"{os.getpid()}\n")
    print("adding", settings["number"])
    if settings.get("child"):
        child = subprocess.Popen(["sleep", "600"])
        (context.folder / "child.txt").write_text(str(child.pid))
    if settings.get("wait_for"):
        for done in range(6000):  # until the test makes the file
            if Path(settings["wait_for"]).exists():
                break
            context.progress(done, 6000, loss=float("nan"))
            time.sleep(0.01)
    if settings.get("fail") and not Path(settings["fail"]).exists():
        raise ValueError("as asked")
    if settings.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    total = settings["number"] + sum(need.result["sum"] for need in context.needs)
    return {"sum": total, "threads": os.environ["OMP_NUM_THREADS"], "seconds": time.perf_counter()}


def answer_badly(settings, context):
    """What no JSON file can hold, what is too large, or no mapping."""
    return {"nan": {"sum": float("nan")}, "large": {"sum": "x" * 2**23}, "list": [1]}[
        settings["how"]
    ]


def plan_number(number, *needs, seconds=2.0, **settings):
    """A task that adds a number to what its needs came to."""
    settings = {"number": number, **settings}
    return Task(f"add {number}", f"{ACTIONS}:add", settings, tuple(needs), seconds)


class Sums(Study):
    """Sums over a shared first number."""

    class Options(StudyOptions):
        """How many, and what the last one does beside adding."""

        count: int = 3
        last: Mapping[str, str] = Field(default={})

    title = "Sums of small numbers"

    @classmethod
    def plan(cls, options):
        first = plan_number(1)
        cells = []
        for number in range(2, 2 + options.count):
            more = options.last if number == 1 + options.count else {}
            task = plan_number(number, first, **more)
            cells.append(Cell(f"1+{number}", {"number": number}, task))
        return cells

    @classmethod
    def summarise(cls, options, results):
        sums = {name: result["sum"] for name, result in results.items()}

        def draw(figure):
            axes = figure.subplots()
            axes.plot(list(sums.values()), "o-")
            axes.set_xlabel("cell")

        return Summary(
            findings={"sums": sums},
            claims=[
                Claim(
                    "Sums grow.", "yes | no", "yes, 3 seeds", "holds", "sum (3)", "All were larger."
                )
            ],
            tables=[Table("Sums", ("cell", "sum"), [(k, str(v)) for k, v in sums.items()])],
            figures=[Figure("growth", "Sums by cell.", draw)],
            notes=["Nothing was learnt."],
        )


class Empty(Sums):
    """Plans nothing."""

    @classmethod
    def plan(cls, options):
        return []


def register_studies(register):
    """Registers the studies."""
    register("sums", Sums, summary="Sums of small numbers", source="own definition")
    register("empty", Empty, summary="Nothing at all", source="own definition")
