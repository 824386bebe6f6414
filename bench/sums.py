"""What a sum over members costs, masked and robust: processor seconds and bytes, both sides.

`python bench/sums.py --out FILE.md [--members 20] [--entries 100000,4000000]`

All in one process on one thread, a member after the other. Seconds are of the processor: of one
member the median over members, of the coordinator all. Bytes are of the messages, before whatever
the transport adds. Members that drop out do so where it costs most: after they shared their secrets
and before their masked vector.
"""

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from molora_fed.privacy.sums.coordinator import Coordinator
from molora_fed.privacy.sums.fixed_point import FixedPoint
from molora_fed.privacy.sums.member import Member
from molora_fed.privacy.sums.messages import Terms
from molora_fed.privacy.sums.robust import sum_by_group
from molora_fed.privacy.sums.vectors import Part, VectorLayout
from molora_fed.storage.files import write_bytes
from molora_fed.storage.keys import build_public_pem

TRIM_SHARE = 0.1


class Clock:
    """Processor seconds by who spent them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def run(self, whose: str, call: Callable[..., Any], *values: Any, **named: Any) -> Any:
        """Call, and count what it took."""
        start = time.process_time()
        try:
            return call(*values, **named)
        finally:
            self.seconds[whose] += time.process_time() - start


def measure_masked(names: list[str], entries: int, bits: Any, gone: int) -> list[str]:
    layout = VectorLayout((Part("sums", (entries,), 1.0),))
    encoding = FixedPoint(layout, len(names), bits)
    keys = {name: ec.generate_private_key(ec.SECP384R1()) for name in names}
    terms = Terms.build(
        {name: build_public_pem(key) for name, key in keys.items()},
        encoding,
        identity="0" * 64,
        fusion="bench",
        question="0" * 64,
    )
    vector = np.random.default_rng(0).uniform(-1.2, 1.2, entries)
    clock, sent, received = Clock(), defaultdict(int), defaultdict(int)

    def begin(name: str) -> Member:
        words = encoding.encode(layout.clip(vector, who=name)[0])
        return Member.begin(name, terms, words, secret=bytes(32), key=keys[name])

    members = {name: clock.run(name, begin, name) for name in names}
    words = members[names[0]].vector
    for member in members.values():
        member.vector = words  # the same: one copy in memory
    coordinator = clock.run("coordinator", Coordinator.begin, terms)
    asked: dict[str, bytes] = dict.fromkeys(names, b"")
    while True:
        for name, data in asked.items():
            call = members[name].answer if data else members[name].send_keys
            if coordinator.state.phase == "masked" and name in names[:gone]:
                continue
            answer = clock.run(name, call, *([data] if data else []))
            received[name] += len(data)
            sent[name] += len(answer)
            clock.run("coordinator", coordinator.receive, name, answer)
            del answer
        if coordinator.state.phase == "revealed":
            break
        asked = clock.run("coordinator", coordinator.advance)
    total = clock.run("coordinator", coordinator.open_total)
    staying = names[gone:]
    if not (total == words * words.dtype.type(len(staying))).all():
        raise SystemExit("the total is another")
    clock.run("coordinator", encoding.decode, total, len(staying))
    return [
        f"masked, {bits} bits",
        f"{entries:,}",
        str(gone),
        f"{statistics.median(clock.seconds[name] for name in staying):.2f}",
        f"{max(sent.values()):,}",
        f"{max(received.values()):,}",
        f"{clock.seconds['coordinator']:.2f}",
        f"{sum(sent.values()):,}",
    ]


def measure_robust(names: list[str], entries: int) -> list[str]:
    layout = VectorLayout((Part("sums", (entries,), 1.0),))
    vector = np.random.default_rng(0).uniform(-1.2, 1.2, entries)
    clock = Clock()
    clipped, _ = clock.run("member", layout.clip, vector, who="member")
    vectors = {name: clipped for name in names}
    alike, sizes = dict.fromkeys(names, "group"), dict.fromkeys(names, 1.0)
    more = {"trim_share": TRIM_SHARE, "exact": ()}
    clock.run("coordinator", sum_by_group, vectors, layout, alike, sizes, **more)
    return [
        f"robust, {TRIM_SHARE:g} trimmed",
        f"{entries:,}",
        "0",
        f"{clock.seconds['member']:.2f}",
        f"{8 * entries:,}",
        "0",
        f"{clock.seconds['coordinator']:.2f}",
        f"{8 * entries * len(names):,}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--members", type=int, default=20)
    parser.add_argument("--entries", default="100000,4000000")
    options = parser.parse_args()
    names = [f"member-{number:04}" for number in range(options.members)]
    head = [
        "way", "entries", "dropped out", "a member, s", "a member sends, bytes",
        "receives, bytes", "coordinator, s", "coordinator receives, bytes",
    ]  # fmt: skip
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for entries in map(int, options.entries.split(",")):
        for bits, gone in ((64, 0), (64, options.members // 5), (32, 0)):
            rows.append(measure_masked(names, entries, bits, gone))
            print(" | ".join(rows[-1]), flush=True)
        rows.append(measure_robust(names, entries))
        print(" | ".join(rows[-1]), flush=True)
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = (
        f"# What a sum over {options.members} members costs\n\n"
        "`python bench/sums.py --out docs/results/sums.md`. Processor seconds on one thread, of a "
        "machine with other\nwork: of one member, encoding and clipping included, and of the "
        "coordinator in all; bytes of the messages. Every\nmasked total was compared with the "
        f"plain one, to the bit. [How](../sums.md).\n\n{table}\n"
    )
    write_bytes(options.out, text.encode())


if __name__ == "__main__":
    main()
