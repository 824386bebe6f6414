"""How fast a trace is written and verified, and that both are linear in its length.

`python bench/trace.py --out FOLDER [--lengths 10000,30000,100000] [--repeats 3]`

The record is a decision of a task: three samples of a probe and two of members with their texts,
about 1.5 KB as a line. Writes FOLDER/trace-bench.json and FOLDER/trace-bench.md.
"""

import argparse
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from molora_fed.storage.files import write_bytes, write_json
from molora_fed.storage.keys import build_public_pem
from molora_fed.tracing.records import encode_json
from molora_fed.tracing.verifying import verify
from molora_fed.tracing.writing import SyncPolicy, TraceWriter

POLICY = SyncPolicy()
ALWAYS = SyncPolicy(mode="always", checkpoint_records=1_000)
ALWAYS_RECORDS = 1_000
WORDS = ("alpha", "beta", "17", "42", "the", "answer", "is", "so", "we", "add", "therefore")


def build_decision(number: int, draw: random.Random) -> dict[str, Any]:
    """A decision as a cascade records it."""

    def sample(model: str) -> dict[str, Any]:
        return {
            "model": model,
            "text": " ".join(draw.choice(WORDS) for _ in range(15)),
            "answer": str(draw.randrange(100)),
            "seed": draw.getrandbits(62),
            "prompt_tokens": 41,
            "new_tokens": draw.randrange(4, 30),
            "flops": draw.random() * 1e9,
            "price": 0.0,
            "failure": None,
            "attempts": 1,
        }

    models = ("probe", "probe", "probe", "member-a", "member-b")
    return {
        "task": f"arithmetic-3-{number}",
        "family": "arithmetic",
        "samples": [sample(model) for model in models],
        "sigma": 0.5,
        "mode": "arena_lite",
        "policy": "sigma",
        "judge": "majority",
        "winner": "member-a",
        "answer": str(draw.randrange(100)),
        "correct": draw.random() < 0.5,
        "cost": {"flops": draw.random() * 1e10, "price": 0.0},
    }


def clock(work: Callable[[], None]) -> dict[str, float]:
    """Wall and processor seconds of a piece of work."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return {
        "wall": time.perf_counter() - wall,
        "processor": time.process_time() - processor,
    }


def measure(folder: Path, bodies: list[dict[str, Any]], policy: SyncPolicy) -> dict[str, Any]:
    """Append all bodies, verify the run, and give the seconds of both."""
    key = ec.derive_private_key(20_261_122, ec.SECP384R1())
    public = build_public_pem(key)
    with TraceWriter(folder, key=key, run_id="bench", sync=policy) as trace:

        def append() -> None:
            for body in bodies:
                trace.append("decision", body)
            trace.sync()

        appending = clock(append)
    reports = []
    verifying = clock(lambda: reports.append(verify(folder, public)))
    if not reports[0].ok or reports[0].covered != reports[0].records:
        raise SystemExit(f"the run does not verify: {reports[0].problems}")
    return {"append": appending, "verify": verifying, "records": reports[0].records}


def run(lengths: list[int], repeats: int) -> dict[str, Any]:
    """Measure every length several times."""
    draw = random.Random(7)
    bodies = [build_decision(number, draw) for number in range(1_000)]
    line_bytes = median(len(encode_json(body)) for body in bodies) + 118
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for length in lengths:
            work = (bodies * (length // len(bodies) + 1))[:length]
            results = []
            for repeat in range(repeats):
                folder = Path(temporary) / f"{length}-{repeat}"
                results.append(measure(folder, work, POLICY))
                (folder / "main-0000.jsonl").unlink()
            rows.append({"records": length, **_rates(results, length)})
        always = measure(Path(temporary) / "always", bodies[:ALWAYS_RECORDS], ALWAYS)
    slowest = {
        what: max(row[what]["processor_seconds"] / row["records"] for row in rows)
        / min(row[what]["processor_seconds"] / row["records"] for row in rows)
        for what in ("append", "verify")
    }
    return {
        "record_bytes": line_bytes,
        "repeats": repeats,
        "policy": {"mode": POLICY.mode, "records": POLICY.records, "ms": POLICY.seconds * 1000},
        "checkpoint_records": POLICY.checkpoint_records,
        "lengths": rows,
        "longest_to_shortest_per_record": slowest,
        "always_appends_per_second": ALWAYS_RECORDS / always["append"]["wall"],
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "load_average": os.getloadavg()[0],
        },
    }


def _rates(results: list[dict[str, Any]], length: int) -> dict[str, Any]:
    rates = {}
    for what in ("append", "verify"):
        wall = median(result[what]["wall"] for result in results)
        processor = median(result[what]["processor"] for result in results)
        rates[what] = {
            "wall_seconds": wall,
            "processor_seconds": processor,
            "per_second": length / wall,
            "per_processor_second": length / processor,
        }
    return rates


def render(result: dict[str, Any]) -> str:
    """The result as a page."""
    machine, policy = result["machine"], result["policy"]
    ratio = result["longest_to_shortest_per_record"]
    rows = "\n".join(
        f"| {row['records']:,} | {row['append']['per_second']:,.0f} "
        f"| {row['append']['per_processor_second']:,.0f} | {row['verify']['per_second']:,.0f} "
        f"| {row['verify']['per_processor_second']:,.0f} |"
        for row in result["lengths"]
    )
    longest = result["lengths"][-1]
    shares = {
        what: longest[what]["processor_seconds"] / longest[what]["wall_seconds"]
        for what in ("append", "verify")
    }
    lengths = ",".join(str(row["records"]) for row in result["lengths"])
    return f"""# Speed of traces

`python bench/trace.py --out docs/results/acar --lengths {lengths} --repeats {result["repeats"]}`

A record is a decision with five samples, {result["record_bytes"]:.0f} bytes as a line (median).
Appending: bounded policy, fsync after {policy["records"]} records or {policy["ms"]:.0f} ms at the
latest, a signed checkpoint every {result["checkpoint_records"]:,} records, one writer. Verifying:
chain, Merkle tree and every signature, one process on one core. Medians of {result["repeats"]}
repeats on {machine["cores"]} cores ({machine["processor"]}, Python {machine["python"]}).

Load average {machine["load_average"]:.1f}: the process got {shares["append"]:.0%} of a core in
appending and {shares["verify"]:.0%} in verifying. On an idle machine figures by wall clock come
nearer to those by processor time, in appending less the time of the disk.

| records | appended a second | per processor second | verified a second | per processor second |
|---:|---:|---:|---:|---:|
{rows}

Linear in length: the processor time of a record differs between these lengths by a factor of at
most {ratio["append"]:.2f} in appending and {ratio["verify"]:.2f} in verifying. With an fsync for
every record, policy "always", {result["always_appends_per_second"]:,.0f} records a second were
appended on this disk.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", default="10000,30000,100000")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    result = run([int(each) for each in arguments.lengths.split(",")], arguments.repeats)
    write_json(arguments.out / "trace-bench.json", result)
    write_bytes(arguments.out / "trace-bench.md", render(result).encode())
    print(render(result))


if __name__ == "__main__":
    main()
