"""Private fusions beside pooled ones of the same cooperative: losses, intervals, forecasts, cost.

    molora demo --seed 42 --privacy pooled --out demo-42      # and others: independent trainings
    python bench/private_fusion.py demo-42 demo-137 demo-2026 --out docs/results/private_fusion.md

Each folder is one `molora demo`, a training of its own with base, specialists and texts. Its
contributions are fused once from their samples, and once by members that each hold their own blocks
and answer with masked sums, all in this process. The unit of replication is the demo. Bars are
those of the difference in held-out loss, equal weight over domains.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from molora_fed.charter import Charter
from molora_fed.contributions.contributed import collect_contributed
from molora_fed.contributions.receive import load_admitted
from molora_fed.cooperative.cooperative import open_cooperative
from molora_fed.cooperative.known_text import read_known_text
from molora_fed.fusion.fuse import fuse, fuse_texts
from molora_fed.fusion.local_members import LocalMembers, drop_text
from molora_fed.fusion.private_texts import PrivateTexts
from molora_fed.options import name_choices
from molora_fed.plugins import get_plugins
from molora_fed.storage.files import write_bytes, write_json

ROUTERS = ("evidence", "evidence-mixed", "evidence-zero", "statistics", "linear")
BARS = {"evidence": 0.001, "evidence-mixed": 0.001, "statistics": 0.0005, "linear": 0.02}
WAYS = ("masked", "robust")


@dataclass(frozen=True)
class Ways:
    """One cooperative, fused in every way.

    Attributes:
        name: Of its folder.
        members: Number of members.
        pooled: Of the pooled fusion, result.json.
        private: Of the private ones by way of summing.
        seconds: Processor seconds of each.
        rounds: Message rounds of the private ones.
    """

    name: str
    members: int
    pooled: dict[str, Any]
    private: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    rounds: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demos", type=Path, nargs="+", help="folders of `molora demo`")
    parser.add_argument("--out", type=Path, default=Path("docs/results/private_fusion.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = arguments.out.with_suffix(".json")
    rows = json.loads(kept.read_bytes())["fusions"] if kept.is_file() else []
    known = {row["name"]: Ways(**row) for row in rows}
    found = []
    for demo in arguments.demos:
        if demo.name not in known:  # stopped and called again, it goes on
            with tempfile.TemporaryDirectory() as folder:
                known[demo.name] = fuse_both_ways(demo, Path(folder))
            write_json(kept, {"fusions": [vars(one) for one in known.values()]})
        found.append(known[demo.name])
        print(describe(found[-1]), flush=True)
    write_bytes(arguments.out, build_page(found).encode())
    missed = [line for one in found for line in list_missed(one)]
    print("\n".join(missed) or "all within their bars")
    raise SystemExit(1 if missed else 0)


def fuse_both_ways(demo: Path, folder: Path) -> Ways:
    """Fuse what a demo admitted."""
    plugins = get_plugins()
    home = demo / "cooperative"
    cooperative = open_cooperative(home)
    base = cooperative.load_base()
    texts = read_known_text(home)
    with cooperative.read_ledger() as ledger:
        contributions = [
            collect_contributed(one, corpus=texts.get(one.manifest.contributor))
            for one in load_admitted(ledger, cooperative.store)
        ]
    charter = choose_routers(cooperative.charter)
    seconds, private, rounds = {}, {}, 0
    began = time.process_time()
    pooled = fuse(base, charter, contributions, folder / "pooled", plugins=plugins)
    seconds["pooled"] = time.process_time() - began
    for way in WAYS:
        began = time.process_time()
        private_charter = keep_private(charter, way)
        experts = [drop_text(one) for one in contributions]
        members = LocalMembers.open(
            base, private_charter, contributions, experts, folder / way, plugins=plugins
        )
        result = fuse_texts(
            base,
            members.charter,
            PrivateTexts(experts, members),
            folder / way / "coordinator",
            plugins=plugins,
        )
        seconds[way] = time.process_time() - began
        private[way], rounds = result.result, 1 + len(members.questions)
    return Ways(demo.name, len(contributions), pooled.result, private, seconds, rounds)


def choose_routers(charter: Charter) -> Charter:
    """The same charter with every router that is compared here."""
    fusion = charter.amendment.fusion
    rules = replace_model(fusion, compare=name_choices(*(n for n in ROUTERS if n != fusion.router)))
    return replace_model(charter, amendment=replace_model(charter.amendment, fusion=rules))


def keep_private(charter: Charter, summing: str) -> Charter:
    """The same charter for texts that stay with their owners."""
    identity = replace_model(charter.identity, privacy_mode="private", summing=summing)
    return replace_model(charter, identity=identity)


def replace_model(model: Any, **changes: Any) -> Any:
    return model.model_copy(update=changes)


def find_loss(result: Mapping[str, Any], method: str) -> dict[str, float]:
    """Equal-weight loss with its interval."""
    found: dict[str, float] = result["equal_weight"][method]
    return found


def list_differences(one: Ways, way: str) -> dict[str, float]:
    """Private less pooled loss, by router."""
    return {
        name: find_loss(one.private[way], f"fused:{name}")["point"]
        - find_loss(one.pooled, f"fused:{name}")["point"]
        for name in ROUTERS
    }


def list_missed(one: Ways) -> list[str]:
    """Differences beyond their bars; a private router may well be better."""
    return [
        f"{one.name}, {way}: {name} {difference:+.5f} nats, bar {BARS[name]}"
        for way in WAYS
        for name, difference in list_differences(one, way).items()
        if difference > BARS.get(name, 1e-5)
    ]


def describe(one: Ways) -> str:
    """A line for whoever waits."""
    parts = [
        f"{way} {name} {difference:+.5f}"
        for way in WAYS
        for name, difference in list_differences(one, way).items()
    ]
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in one.seconds.items())
    return f"{one.name}: {'; '.join(parts)}; {one.rounds} message rounds; {seconds}"


def build_page(found: Sequence[Ways]) -> str:
    """The page of results."""
    lines = [
        "# Private fusions beside pooled ones",
        "",
        f"`python bench/private_fusion.py {' '.join(one.name for one in found)}`; every folder is "
        "one `molora demo` with base, specialists and texts of its own: the unit of replication. "
        "Equal-weight held-out losses in nats a token; in brackets 95 % intervals, by bootstrap "
        "over document clusters where texts are pooled, by Student's t from sums elsewhere.",
        "",
        "| demo | router | pooled | private, masked sums | difference | robust sums, difference |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        masked, robust = (list_differences(one, way) for way in WAYS)
        for name in ROUTERS:
            pooled, private = (
                find_loss(result, f"fused:{name}") for result in (one.pooled, one.private["masked"])
            )
            lines.append(
                f"| {one.name} | `{name}` | {quote(pooled)} | {quote(private)} | "
                f"{masked[name]:+.5f} | {robust[name]:+.5f} |"
            )
    lines += ["", "Gain over the best anyone has alone, and what was forecast before fusing:", ""]
    lines += ["| demo | | pooled | private |", "|---|---|---|---|"]
    for one in found:
        router = one.pooled["router"]
        gains = [
            f"{r['gain_percent'][router]['vs_best_alone']:+.3f} % "
            + quote_ends(r["gain_interval_percent"][router]["vs_best_alone"], 3)
            for r in (one.pooled, one.private["masked"])
        ]
        lines.append(f"| {one.name} | gain of `{router}` | {' | '.join(gains)} |")
        for name, record in one.pooled["forecasts"].items():
            other = one.private["masked"]["forecasts"].get(name)
            if record.get("point") is None or other is None:
                continue
            lines.append(
                f"| {one.name} | forecast `{name}` | {record['point']:+.3f} % | "
                f"{other['point']:+.3f} % |"
            )
    lines += [
        "",
        "| demo | members | message rounds | processor seconds, pooled | masked | robust |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    for one in found:
        spent = [f"{one.seconds[name]:.0f}" for name in ("pooled", *WAYS)]
        lines.append(f"| {one.name} | {one.members} | {one.rounds} | {' | '.join(spent)} |")
    lines += [
        "",
        "Seconds are of all members and the coordinator together, in one process of one thread. "
        "Fit rounds of routers run side by side; `linear` has the most.",
        "",
    ]
    missed = [line for one in found for line in list_missed(one)]
    lines += ["Beyond their bars: " + ("; ".join(missed) if missed else "none") + ".", ""]
    return "\n".join(lines)


def quote(loss: Mapping[str, float]) -> str:
    return f"{loss['point']:.5f} {quote_ends(loss, 4)}"


def quote_ends(interval: Mapping[str, float], digits: int) -> str:
    return f"[{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"


if __name__ == "__main__":
    main()
