"""SIGKILL at random points: no acknowledged record of a trace is lost, whatever was being written.

`python bench/trace_kill.py --out FOLDER [--kills 50] [--seed 1]`

Two writers append decisions of about 1.5 KB to one run, each in a process of its own, and say which
records were acknowledged; at random times one of them is killed and opened again. Afterwards every
acknowledged record must be in the run with the body it had, the run must verify, and it is sealed.
Writes FOLDER/trace-kill.json and FOLDER/trace-kill.md.
"""

import argparse
import atexit
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from molora_fed.storage.files import write_bytes, write_json
from molora_fed.storage.keys import build_public_pem, load_key, load_or_make_key
from molora_fed.tracing.reading import read_records
from molora_fed.tracing.verifying import seal_run, verify
from molora_fed.tracing.writing import SyncPolicy, TraceWriter

RUN = "kill"
POLICIES = {
    "always": SyncPolicy(mode="always", checkpoint_records=50),
    "bounded": SyncPolicy(records=256, seconds=0.2, checkpoint_records=500),
    "sync by hand": SyncPolicy(records=10**9, seconds=1e9, checkpoint_records=1_000),
}
TEXT = "The quick brown fox jumps over the lazy dog. " * 32
MAX_DELAY_SECONDS = 0.4
BY_HAND = 6_000
"""Records from one sync to the next where the writer syncs by hand: large writes, which tear."""
PAUSE_RECORDS, PAUSE_SECONDS = 100, 0.02
"""A writer rests so long after so many records, so that segments do not grow without end."""
MAX_AIM_SECONDS = 0.02
"""Writers that sync by hand are killed so soon after a sync began."""


def write_until_killed(folder: Path, key: Path, writer: str, policy: str) -> None:
    """A writer's process: append for ever, and say on standard output what was acknowledged."""
    trace = TraceWriter(folder, key=load_key(key), run_id=RUN, writer=writer, sync=POLICIES[policy])
    file = trace.header.segment.file
    torn = trace.recovered.size_bytes if trace.recovered else 0
    os.write(1, f"ready {torn}\n".encode())
    waiting: list[tuple[int, int]] = []
    number = 0
    while True:
        number += 1
        body = {"task": f"{file}-{number}", "number": number, "text": TEXT}
        waiting.append((trace.append("decision", body), number))
        if policy == "sync by hand" and number % BY_HAND == 0:
            os.write(1, b"sync\n")
            trace.sync()
        if number % PAUSE_RECORDS == 0:
            time.sleep(PAUSE_SECONDS)
        if trace.acknowledged >= waiting[0][0]:
            safe = [each for each in waiting if each[0] <= trace.acknowledged]
            waiting = waiting[len(safe) :]
            os.write(1, "".join(f"{file} {seq} {n}\n" for seq, n in safe).encode())


class Writer:
    """A writer's process, and what it said."""

    def __init__(self, folder: Path, key: Path, name: str, policy: str) -> None:
        self.policy = policy
        command = [sys.executable, __file__, "--child", str(folder), str(key), name, policy]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        self._lines: list[bytes] = []
        self._ready, self.syncing = threading.Event(), threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(300) or not self._lines:
            self._process.kill()
            raise SystemExit("a writer does not begin")

    def _read(self) -> None:
        if self._process.stdout is not None:
            for line in self._process.stdout:
                if line == b"sync\n":
                    self.syncing.set()
                else:
                    self._lines.append(line)
                self._ready.set()
        self._ready.set()
        self.syncing.set()

    def kill(self) -> tuple[int, dict[tuple[str, int], int]]:
        """Kill it; gives the torn bytes it had found, and what it had acknowledged."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()
        acknowledged = {}
        for line in self._lines[1:]:
            if line.endswith(b"\n"):  # The kill may cut what it said, too.
                file, seq, number = line.split()
                acknowledged[file.decode(), int(seq)] = int(number)
        return int(self._lines[0].split()[1]), acknowledged


def run(kills: int, seed: int) -> dict[str, Any]:
    """Kill, count and compare."""
    draw = random.Random(seed)
    acknowledged: dict[tuple[str, int], int] = {}
    by_policy: Counter[str] = Counter()
    told = 0
    with tempfile.TemporaryDirectory() as temporary:
        key_path, folder = Path(temporary) / "key.pem", Path(temporary) / "run"
        key = load_or_make_key(key_path)
        public = build_public_pem(key)

        def start(name: str) -> Writer:
            return Writer(folder, key_path, name, draw.choice(sorted(POLICIES)))

        writers = {name: start(name) for name in ("one", "two")}
        atexit.register(lambda: [writer.kill() for writer in writers.values()])
        for number in range(kills + len(writers)):
            ending = number >= kills
            name = sorted(writers)[0] if ending else draw.choice(sorted(writers))
            _wait(writers[name], draw)
            torn, safe = writers[name].kill()
            told += torn > 0
            acknowledged |= safe
            by_policy[writers.pop(name).policy] += 1
            if number % 10 == 9:
                _check_open(folder, public)
            if not ending:
                writers[name] = start(name)
        root = seal_run(folder, key=key)
        report = verify(folder, public, root)
        found = {
            (record.file, record.seq): record.body["number"]
            for record in read_records(folder)
            if record.kind == "decision"
        }
        torn_files = list(folder.glob("*.torn*"))
        torn_bytes = sum(path.stat().st_size for path in torn_files)
    lost = [each for each, number in acknowledged.items() if found.get(each) != number]
    return {
        "kills": by_policy.total(),
        "seed": seed,
        "kills_by_policy": dict(sorted(by_policy.items())),
        "acknowledged_records": len(acknowledged),
        "lost_records": len(lost),
        "records_in_run": len(found),
        "torn_ends_set_aside": len(torn_files),
        "torn_ends_told_by_writers": told,
        "torn_bytes": torn_bytes,
        "sealed_run_verifies": report.ok,
    }


def _wait(writer: Writer, draw: random.Random) -> None:
    """A random time; of a writer that syncs by hand, into one of its large writes."""
    if writer.policy == "sync by hand":
        writer.syncing.clear()
        writer.syncing.wait(300)
        time.sleep(draw.uniform(0, MAX_AIM_SECONDS))
    else:
        time.sleep(draw.uniform(0, MAX_DELAY_SECONDS))


def _check_open(folder: Path, public: str) -> None:
    """The open run must verify too, while the other writer goes on."""
    report = verify(folder, public)
    if not report.ok:
        raise SystemExit(f"the open run does not verify: {report.problems[0]}")


def render(result: dict[str, Any]) -> str:
    """The result as a page."""
    policies = ", ".join(f"{count} x {name}" for name, count in result["kills_by_policy"].items())
    torn = f"{result['torn_ends_set_aside']:,} ({result['torn_bytes']:,} bytes)"
    return f"""# SIGKILL at random points of writing a trace

`python bench/trace_kill.py --out docs/results/acar --kills 50 --seed {result["seed"]}`

Two writers append decisions of about 1.5 KB to one run, each in a process of its own. At random
times one of them is killed and opened again while the other goes on. Every ten kills the open run
is verified while the other writer writes. Writers under the fsync policies "always" and "bounded"
(docs/traces.md) are killed 0 to {MAX_DELAY_SECONDS} s after the kill before; those that sync by
hand, every {BY_HAND:,} records, up to {MAX_AIM_SECONDS * 1000:.0f} ms after a sync began, so that
large writes are torn.

| | |
|---|---:|
| kills | {result["kills"]} ({policies}) |
| records acknowledged before a kill | {result["acknowledged_records"]:,} |
| of these missing or changed afterwards | **{result["lost_records"]:,}** |
| records in the run, not acknowledged ones included | {result["records_in_run"]:,} |
| torn ends found and set aside | {torn} |
| the run, sealed afterwards, verifies | {"yes" if result["sealed_run_verifies"] else "NO"} |

A record that is in the run without having been acknowledged is no fault: the process was killed
between the disk and its saying so.
"""


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        write_until_killed(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    result = run(arguments.kills, arguments.seed)
    write_json(arguments.out / "trace-kill.json", result)
    write_bytes(arguments.out / "trace-kill.md", render(result).encode())
    print(render(result))
    if result["lost_records"] or not result["sealed_run_verifies"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
