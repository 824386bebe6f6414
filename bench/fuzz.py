"""Feeds every entry point with changed files, guided by coverage, and counts what it does.

    pip install -e .[fuzz]
    python bench/fuzz.py                                # every target, about a million inputs
    python bench/fuzz.py --inputs 2000 --only manifest  # at most so many: a short look

One process a target (atheris, libFuzzer) with a limit of memory and of 5 seconds an input. What
ends in anything but a one-line error of this package is a finding; its input goes to
tests/data/fuzz, which `make test` repeats. Finished targets are kept in `--work`; stopped and
called again, it goes on with the others. Coverage is that of the corpora libFuzzer found, measured
afterwards by branch over the functions that read what comes through a door.
"""

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

FOUND = REPOSITORY / "tests" / "data" / "fuzz"
SECONDS = 5
SEED = 11
PAGE = """# Fuzzing the doors

`python bench/fuzz.py`; {inputs:,} inputs in all. Every door is a parser of something from outside;
an input is a good file changed inside its structure, chosen by what reached new code (atheris). An
input counts as handled if it is read, or refused in one line. Limits: {seconds} seconds an input,
{memory} MiB beyond the process itself. Branches are those of all functions that look at the outside
value (`PARSERS` in tests/fuzz_targets.py), over the inputs libFuzzer kept for a door's targets.

| door | inputs | branches reached | | missed |
| --- | ---: | ---: | ---: | --- |
{doors}

| door | target | inputs | unhandled | slowest input |
| --- | --- | ---: | ---: | ---: |
{table}

{versions}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, help="at most so many for each target")
    parser.add_argument("--only", nargs="+", default=(), metavar="TARGET")
    parser.add_argument("--work", type=Path, default=Path("fuzz"), help="corpora and results")
    parser.add_argument("--out", type=Path, help="page to write, e.g. docs/results/fuzz.md")
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=("fuzz", "cover"), help=argparse.SUPPRESS)
    arguments, rest = parser.parse_known_args()
    if arguments.child == "fuzz":
        fuzz(arguments.only[0], arguments.work, arguments.scratch, rest)
    elif arguments.child == "cover":
        print(json.dumps(cover(arguments.only[0], arguments.work)))
    else:
        run_all(arguments)


def find_target(name: str) -> Any:
    from fuzz_targets import TARGETS

    return next(target for target in TARGETS if target.name == name)


def run_all(arguments: argparse.Namespace) -> None:
    from fuzz_targets import TARGETS
    from rich.progress import track

    chosen = [t for t in TARGETS if not arguments.only or t.name in arguments.only]
    results = {}
    for target in track(chosen, description="targets"):
        work = (arguments.work / target.name).absolute()
        kept = work / "result.json"
        inputs = min(target.fuzzed, arguments.inputs or target.fuzzed)
        if not kept.exists() or json.loads(kept.read_bytes())["inputs"] < inputs:
            work.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(run_target(target, work, inputs), indent=1))
        results[target.name] = json.loads(kept.read_bytes())
        print(target.name, _count_lists(results[target.name]), flush=True)
    page = write_page(chosen, results)
    if arguments.out:
        arguments.out.write_text(page, encoding="utf-8")
    print(page)


def _count_lists(found: dict[str, Any]) -> dict[str, Any]:
    """A result for people: of branches only how many."""
    return {
        key: len(value) if key in ("reached", "missed") else value for key, value in found.items()
    }


def run_target(target: Any, work: Path, inputs: int) -> dict[str, Any]:
    """Fuzz one target in a process of its own, and measure what its corpus covers."""
    corpus = work / "corpus"
    corpus.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--only", target.name, "--work", str(work)]
    options = [
        f"-runs={inputs}", f"-timeout={SECONDS}", f"-seed={SEED}", "-rss_limit_mb=0",
        "-max_len=65536", "-len_control=0", "-print_final_stats=1",
        f"-artifact_prefix={work}/", str(corpus),
    ]  # fmt: skip
    started = time.monotonic()
    log = work / "fuzz.log"
    shared = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with log.open("wb") as file, tempfile.TemporaryDirectory(dir=shared) as scratch:
        ran = subprocess.run(
            [*command, "--child", "fuzz", "--scratch", scratch, *options],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    text = log.read_text("utf-8", "replace")
    done = [line.split()[-1] for line in text.splitlines() if "number_of_executed_units" in line]
    FOUND.mkdir(exist_ok=True)
    for path in sorted((work / "findings").iterdir()):
        shutil.copyfile(path, FOUND / path.name)
    covered = subprocess.run([*command, "--child", "cover"], capture_output=True, check=True)
    return {
        "inputs": int(done[-1]) if done else 0,
        "status": ran.returncode,
        "seconds": round(time.monotonic() - started, 1),
        "slowest_seconds": json.loads((work / "slowest.json").read_bytes()),
        "findings": sorted(path.name for path in (work / "findings").glob("*")),
        **json.loads(covered.stdout.splitlines()[-1]),
    }


def fuzz(name: str, work: Path, scratch: Path, options: Sequence[str]) -> None:
    """The process of one target; does not return, and leaves its scratch to who started it."""
    import atheris

    with atheris.instrument_imports(include=["molora_fed"]):
        target = find_target(name)
    from fuzz_folders import limit_memory

    from molora_fed.errors import MoloraError

    findings = work / "findings"
    findings.mkdir(exist_ok=True)
    seeds, run = target.prepare(scratch)
    corpus = Path(options[-1])
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
        run(seed)
    for path in FOUND.glob(f"{name}-*"):
        shutil.copyfile(path, corpus / path.name)
    limit_memory()
    slowest, seen = 0.0, set[str]()
    usual = 2 * max(len(seed) for seed in seeds)

    def call(data: bytes) -> None:
        nonlocal slowest
        started = time.process_time()
        try:
            run(data)
            fault = None
        except MoloraError as error:
            fault = "several-lines" if "\n" in str(error) else None
        except BaseException as error:
            fault = _name_fault(error)
            if fault not in seen:
                traceback.print_exception(error)
        if fault is not None and fault not in seen:
            seen.add(fault)
            (findings / f"{target.name}-{fault}").write_bytes(data)
        spent = time.process_time() - started
        if spent > slowest:
            slowest = spent
            (work / "slowest.json").write_text(f"{slowest:.3f}")

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        chance = random.Random(seed)
        # What reached new code is often too broken to reach more, and may have grown very long.
        if chance.random() < (target.fresh if len(data) <= usual else 0.95):
            data = chance.choice(seeds)
        if chance.random() >= 0.1:
            with contextlib.suppress(ValueError, RecursionError):  # changed so often: too deep
                return bytes(target.mutate(bytes(data), chance)[:max_size])
        return bytes(atheris.Mutate(data, max_size))

    atheris.Setup([__file__, *options], call, custom_mutator=change)
    atheris.Fuzz()


def _name_fault(error: BaseException) -> str:
    """Kind and place of an error, as a file name: one finding for each."""
    place, trace = "", error.__traceback__
    while trace is not None:
        if "molora_fed" in trace.tb_frame.f_code.co_filename:
            file = Path(trace.tb_frame.f_code.co_filename).stem
            place = f"{file}-{trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    return f"{type(error).__name__}-{place}"


def cover(name: str, work: Path) -> dict[str, list[str]]:
    """Branches that a target's corpus reaches and misses, among those of its door's parsers."""
    import coverage

    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(scratch) / "coverage"  # of this process, and those that a target starts
        measured = coverage.Coverage(
            branch=True, data_file=kept, data_suffix=True, include=["*/molora_fed/*"]
        )
        measured.start()
        target = find_target(name)
        from fuzz_targets import PARSERS

        folder = Path(scratch) / "target"
        folder.mkdir()
        seeds, run = target.prepare(folder)
        for data in (*seeds, *(path.read_bytes() for path in sorted((work / "corpus").iterdir()))):
            with contextlib.suppress(Exception):
                run(data)
        measured.stop()
        measured.save()
        measured.combine([scratch])
        measured.json_report(outfile=f"{scratch}/report.json")
        files = json.loads(Path(scratch, "report.json").read_bytes())["files"]
    found: dict[str, list[str]] = {"reached": [], "missed": []}
    for module, prefixes in PARSERS[target.door].items():
        path = str(Path(str(import_module(module).__file__)).relative_to(Path.cwd()))
        for function, lines in files[path]["functions"].items():
            if function and function.startswith(prefixes):
                for kind, key in (("reached", "executed"), ("missed", "missing")):
                    found[kind] += [f"{path}:{a}:{b}" for a, b in lines[f"{key}_branches"]]
    return found


def write_page(targets: Sequence[Any], results: dict[str, dict[str, Any]]) -> str:
    import importlib.metadata as metadata

    from fuzz_folders import MEMORY_BYTES

    rows = []
    doors: dict[str, list[dict[str, Any]]] = {}
    for target in targets:
        found = results[target.name]
        doors.setdefault(target.door, []).append(found)
        rows.append(
            f"| {target.door} | {target.name} | {found['inputs']:,} | {len(found['findings'])} "
            f"| {found['slowest_seconds']:.2f} s |"
        )
    reached_rows = []
    for door, all_found in doors.items():
        reached = {branch for found in all_found for branch in found["reached"]}
        every = reached | {branch for found in all_found for branch in found["missed"]}
        missed = ", ".join(f"`{_name_branch(branch)}`" for branch in sorted(every - reached))
        reached_rows.append(
            f"| {door} | {sum(found['inputs'] for found in all_found):,} | {len(reached)} of "
            f"{len(every)} | {len(reached) / len(every):.0%} | {missed} |"
        )
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("atheris", "coverage"))
    return PAGE.format(
        inputs=sum(found["inputs"] for found in results.values()),
        seconds=SECONDS,
        memory=MEMORY_BYTES // 2**20,
        doors="\n".join(reached_rows),
        table="\n".join(rows),
        versions=f"Seed {SEED}; {versions}.",
    )


def _name_branch(branch: str) -> str:
    """A branch as "file.py: line to line", out of the function with a negative number."""
    path, start, end = branch.split(":")
    goes = f"{start} to {end}" if int(end) > 0 else f"{start} out"
    return f"{Path(path).name}: {goes}"


if __name__ == "__main__":
    main()
