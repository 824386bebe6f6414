"""Bad input and killed processes: each is met by one line, an exit code, and nothing half-written.

    python bench/bad_input.py --out docs/results/bad_input.md    # some minutes on two cores

Makes a tiny cooperative in a temporary folder and runs every case as the real `molora` command in a
process of its own. Exits with 1 if any case misbehaves: another exit code than documented, more
than one line of error, a traceback, a temporary file, a file that is not whole.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bad_input_files import find_free_port, run_adapter_cases, run_other_cases
from bad_input_models import run_joining_cases, run_model_cases
from bad_input_processes import run_killed_training, run_upload_cases
from bad_input_stage import Outcome, Stage, wait_until

from molora_fed.federation.homes import CoordinatorHome
from molora_fed.storage.files import write_bytes

LONG_STEPS = 600
_SHOWN_FILES = 6


def run_cases(stage: Stage) -> Iterator[Outcome]:
    """Run every case on a prepared stage."""
    yield from run_other_cases(stage)
    yield from run_model_cases(stage)
    port = find_free_port()
    stage.copy("coop", "serving")
    server = stage.start(f"serve serving --insecure --port {port} --threads 1", log="serving")
    wait_until(CoordinatorHome(stage.root / "serving").pulse.read, "the server")
    yield from run_adapter_cases(
        stage,
        f"join --server 127.0.0.1:{port} --domain abc --data texts-abc --home joined --yes "
        "--threads 1 --name abc-1",
    )
    yield from run_joining_cases(stage, f"127.0.0.1:{port}")
    server.terminate()
    server.wait(timeout=60)
    create = f"coop create long --base base --folder uploading --kind delta --steps {LONG_STEPS}"
    stage.expect(f"{create} --block-size 32 --expected 1 --privacy pooled")
    yield run_killed_training(stage, "uploading")
    yield from run_upload_cases(stage, "uploading")


def build_page(outcomes: Sequence[Outcome], title: str, command: str) -> str:
    """The Markdown page of some cases, with the command that made it."""
    bad = sum(bool(outcome.problems) for outcome in outcomes)
    lines = [
        f"# {title}",
        "",
        f"`{command}`",
        "",
        f"{len(outcomes)} commands, {bad} of which misbehaved. Each is the real `molora` command, "
        "a process of its own. Lines are lines of standard error. Every file that appeared was "
        "looked at: no temporary name (`.NAME.….tmp`, `.NAME.….old`), JSON parses, safetensors "
        "open, blobs hash to their names, the ledger's integrity check passes.",
        "",
        "| case | how | exit code | lines | half-written | as it should be |",
        "|---|---|---:|---:|---|---|",
    ]
    for one in outcomes:
        left = "; ".join(p for p in one.problems if p.startswith("left ")) or "nothing"
        verdict = "no: " + "; ".join(one.problems) if one.problems else "yes"
        lines.append(f"| {one.case} | {one.how} | {one.code} | {one.lines} | {left} | {verdict} |")
    lines += ["", "A negative exit code is the signal that the case sent.", "", "## Messages"]
    for one in outcomes:
        message = one.message.replace("```", "'''") or "(none)"
        lines += ["", f"### {one.case}: {one.how}", "", "```", f"$ {one.command}", message, "```"]
        lines += ["", f"New files: {_list_files(one.new_files)}."]
        lines += [f"Also: {one.note}."] if one.note else []
    return "\n".join(lines) + "\n"


def _list_files(names: Sequence[str]) -> str:
    """Files and folders that appeared, or how many in each folder if they are many."""
    if not names:
        return "none"
    if len(names) <= _SHOWN_FILES:
        return ", ".join(f"`{name}`" for name in names)
    counts: dict[str, int] = {}
    for name in names:
        folder = "/".join(name.split("/")[:2])
        counts[folder] = counts.get(folder, 0) + 1
    return ", ".join(f"`{folder}` ({count})" for folder, count in sorted(counts.items()))


def run_stage(
    prepare: Callable[[Stage], None], cases: Callable[[Stage], Iterator[Outcome]]
) -> list[Outcome]:
    """Run cases on a prepared stage in a temporary folder, each outcome printed as it comes."""
    # Ended from outside it still ends its processes and unmounts.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    outcomes = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        stage = Stage(Path(folder))
        try:
            prepare(stage)
            for outcome in cases(stage):
                outcomes.append(outcome)
                print(
                    f"{'BAD ' if outcome.problems else 'ok  '} {outcome.case}: {outcome.how}: exit "
                    f"{outcome.code}, {outcome.lines} lines; {'; '.join(outcome.problems)}",
                    flush=True,
                )
        finally:
            stage.close()
    return outcomes


def report(outcomes: Sequence[Outcome], title: str, command: str, out: Path | None) -> int:
    """Write the page, or print it; 1 if any case misbehaved."""
    page = build_page(outcomes, title, command)
    if out is None:
        print(page)
    else:
        write_bytes(out, page.encode())
    return int(any(outcome.problems for outcome in outcomes))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="Markdown page to write")
    arguments = parser.parse_args()
    outcomes = run_stage(Stage.prepare, run_cases)
    command = "python bench/bad_input.py --out docs/results/bad_input.md"
    return report(outcomes, "Bad input", command, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
