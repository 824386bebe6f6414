"""A federation evolves a population on texts that stay with its contributors, and is watched.

`python bench/private_evolution.py [--out docs/results/evolution/private] [--keep FOLDER]`

Two contributors with built-in domains join one server, each over a line that records every byte.
In mid-generation first the coordinator's worker and then a contributor's are killed by SIGKILL. The
result is compared, byte by byte, with the same questions asked in one process that nobody
disturbs, and by loss with the same start evolved on the same texts pooled. What crossed is searched
for text and token ids; the same search must find them in what a pooled contribution sends.
"""

import argparse
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from molora_fed.charter import (
    Amendment,
    Charter,
    FusionRules,
    OperatorRules,
    PopulationRules,
    PrivacyRules,
    SampleRules,
    TrainingRules,
)
from molora_fed.contributions.contributed import Contributed
from molora_fed.contributions.manifest import Contribution
from molora_fed.contributions.receive import load_admitted
from molora_fed.cooperative.cooperative import Cooperative
from molora_fed.cooperative.create import found_cooperative
from molora_fed.cooperative.evolve import PooledTexts, PrivateTexts, evolve_contributions
from molora_fed.corpus.blocks import Blocks
from molora_fed.corpus.builtin import DEFAULT_DOMAINS
from molora_fed.corpus.prepare import load_corpus
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.local import LocalContributor, run_local
from molora_fed.federation.status import FederationEvent
from molora_fed.models.base import Base
from molora_fed.plugins import get_plugins
from molora_fed.population.private_member import PrivateMember
from molora_fed.serving.addresses import find_free_port
from molora_fed.storage.files import write_bytes, write_json
from molora_fed.storage.values import find_cache_folder
from molora_fed.testing.models import Table
from molora_fed.testing.traffic import RecordingLine, find_text, find_tokens
from molora_fed.types import Split

OUT = Path("docs/results/evolution/private")
DOMAINS = ("cpp", "science")
SEED = 42
SEARCHED = 1_000  # blocks of each split
RULES = PopulationRules(
    data="private",
    slots=4,
    rank=8,
    generations=3,
    start_steps=40,
    steps=40,
    lifecycle=(
        # So high a threshold that somebody dies in every generation, and the guard is asked.
        OperatorRules(name="death", options={"threshold": 0.02, "patience": 1, "min_age": 1}),
        OperatorRules(name="slot-reallocation"),
        OperatorRules(name="inheritance"),
        OperatorRules(name="svd-mutation"),
    ),
)
AMENDMENT = Amendment(
    domains=tuple(DEFAULT_DOMAINS),  # the base's; two of them take part
    expected=len(DOMAINS),
    seed=SEED,
    training=TrainingRules(kind="lora", rank=16, steps=200, validate_every=50),
    samples=SampleRules(calibration=1_200, held_out=120),
    fusion=FusionRules(mode="population"),
    population=RULES,
)
SETTINGS = AMENDMENT.model_dump(mode="json", include={"training", "samples", "population"})


@dataclass(frozen=True)
class Member(LocalContributor):
    """Reaches its server over a line that records."""

    port: int = 0

    def take_part(self, server: str, on_event: Any, stop: Any) -> dict[str, Any]:
        """`join`, through the line."""
        return super().take_part(f"127.0.0.1:{self.port}", on_event, stop)


@dataclass
class Meddler:
    """Shows events, and kills each worker once in the middle of a generation."""

    homes: dict[str, Path]
    kills: list[str] = field(default_factory=list)
    began: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, event: FederationEvent) -> None:
        """Take in an event."""
        who = event.contributor or "server"
        print(f"{who}: {event.phase} {event.step or ''} {event.message}", flush=True)
        if event.contributor:
            return
        self.began = self.began or time.monotonic()
        for phase in ("FUSING", "PUBLISHED"):
            if event.phase == phase:
                self.seconds.setdefault(phase, time.monotonic() - self.began)
        if "generation 1: adaptation" in event.message:
            self._kill("coordinator")
        if "generation 2: adaptation" in event.message:
            self._kill("worker")

    def _kill(self, module: str) -> None:
        name = f"molora_fed.federation.{module}"
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if module not in self.kills and name in words and str(self.homes[module]) in words:
                process.kill()
                self.kills.append(module)


def federate(root: Path) -> tuple[Cooperative, Base, list[Member], dict[str, Any], Meddler]:
    """The whole federation; what crossed each line comes back by contributor."""
    cooperative, base = found_cooperative(
        root / "server", "private", amendment=AMENDMENT, cache=find_cache_folder(),
        privacy=PrivacyRules(mode="pooled"),
        on_phase=print,
    )  # fmt: skip
    port = find_free_port()
    meddler = Meddler({"coordinator": root / "server", "worker": root / DOMAINS[0]})
    with ExitStack() as stack:
        lines = [stack.enter_context(RecordingLine(port)) for _ in DOMAINS]
        members = [
            Member(root / domain, JoinSettings(f"{domain}-1", domain), port=line.port)
            for domain, line in zip(DOMAINS, lines, strict=True)
        ]
        run_local(cooperative.folder, members, meddler, port=port, threads=1)
        traffic = {
            member.settings.name: {"sent": line.sent, "received": line.received}
            for member, line in zip(members, lines, strict=True)
        }
    return cooperative, base, members, traffic, meddler


def evolve_undisturbed(
    root: Path,
    base: Base,
    charter: Charter,
    admitted: list[Contribution],
    blocks: dict[str, Any],
) -> tuple[Table, dict[str, Any]]:
    """The same questions in one process."""
    plugins = get_plugins()
    people = {
        one.manifest.contributor: PrivateMember(
            base,
            blocks[one.manifest.contributor],
            charter,
            root / one.manifest.contributor,
            threads=1,
            plugins=plugins,
        )
        for one in admitted
    }
    table = Table(root, people, charter, plugins)
    texts = PrivateTexts(charter, admitted, table, plugins=plugins)
    done = evolve_contributions(
        base, charter, texts, root / "evolution", plugins=plugins,
        on_phase=lambda phase: print(f"undisturbed: {phase}", flush=True),
    )  # fmt: skip
    return table, done.result


def evolve_pooled(
    root: Path,
    base: Base,
    charter: Charter,
    admitted: list[Contribution],
    blocks: dict[str, Any],
) -> dict[str, Any]:
    """The same start, steps and texts, but in one place."""
    samples = charter.amendment.samples
    contributed = [
        Contributed(
            id=one.id,
            contributor=one.manifest.contributor,
            domain=one.manifest.domain,
            adapter=one.adapter_folder,
            held_out=blocks[one.manifest.contributor][Split.HELD_OUT].take(samples.held_out),
            calibration=blocks[one.manifest.contributor][Split.CALIBRATION].take(
                samples.calibration
            ),
        )
        for one in admitted
    ]
    plugins = get_plugins()
    texts = PooledTexts(base, charter, contributed, root, plugins=plugins)
    done = evolve_contributions(
        base, charter, texts, root, plugins=plugins,
        on_phase=lambda phase: print(f"pooled: {phase}", flush=True),
    )  # fmt: skip
    return done.result


def read_evolution(folder: Path) -> dict[str, bytes]:
    """Bytes of everything that must not depend on kills."""
    found = [folder / "lineage.jsonl"]
    for name in ("generation.json", "router.safetensors", "population/*"):
        found += sorted(folder.glob(f"generations/*/{name}"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def search(traffic: dict[str, Any], blocks: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Look for text and token ids of every split in all that crossed; blocks as far as used."""
    streams = [one for both in traffic.values() for each in both.values() for one in each]
    rows: dict[str, Any] = {"bytes": sum(map(len, streams))}
    own = [part.take(SEARCHED) for parts in blocks.values() for part in parts.values()]
    texts = [tokenizer.decode(row.tolist()) for part in own for row in part.tokens]
    rows["characters looked for"] = sum(map(len, texts))
    rows["tokens looked for"] = sum(part.tokens.size for part in own)
    rows["pieces of text found"] = len(find_text(streams, texts, length=40))
    everything = np.concatenate([part.tokens for part in own])
    rows["runs of token ids found"] = len(find_tokens(streams, everything))
    pooled: Blocks = own[0].take(4)
    sent = [b"..." + pooled.to_bytes()]
    rows["runs found in a pooled sample of 4 blocks"] = len(find_tokens(sent, pooled.tokens))
    return rows


def describe_fused(result: dict[str, Any]) -> dict[str, Any]:
    """The figures that private and pooled are compared by."""
    router = result["router"]
    return {
        "best_alone": result["best_alone"],
        "fused": result["equal_weight"][f"fused:{router}"],
        "uniform": result["equal_weight"]["uniform"],
        "gain_percent": result["gain_percent"][router]["vs_best_alone"],
        "gain_interval_percent": result["gain_interval_percent"][router]["vs_best_alone"],
        "guard": result["guard"],
        "losses": result["losses"],
    }


def write_page(path: Path, result: dict[str, Any]) -> None:
    """The page beside the figures."""
    private, pooled = result["private"], result["pooled"]
    searched, questions = result["search"], result["questions"]
    lines = [
        "# Evolution on private texts",
        "",
        "`python bench/private_evolution.py` (two contributors, real processes, killed twice).",
        "",
        f"Domains {', '.join(result['domains'])}. The guard kept {private['guard']['kept']} of "
        f"{private['guard']['compared']} lifecycles.",
        "",
        "| | private | same texts pooled |",
        "|---|---|---|",
    ]
    for label, name in (("loss, nats", "fused"), ("uniform gates, nats", "uniform")):
        cells = [f"{one[name]['point']:.4f}" for one in (private, pooled)]
        lines.append(f"| {label} | {cells[0]} | {cells[1]} |")
    cells = [
        f"{one['gain_percent']:+.2f} % ({one['gain_interval_percent']['low']:+.2f} to "
        f"{one['gain_interval_percent']['high']:+.2f})"
        for one in (private, pooled)
    ]
    lines += [
        f"| gain over the best alone | {cells[0]} | {cells[1]} |",
        "",
        "Held-out, equal weight over domains, 95 % intervals by document cluster. Pooled takes the "
        "same number of steps, each on the blocks of all domains.",
        "",
        "| check | |",
        "|---|---|",
        f"| killed by SIGKILL in mid-generation | {', '.join(result['killed'])} |",
        f"| files equal to an undisturbed run's | {result['files']['equal']} of "
        f"{result['files']['compared']} |",
        f"| questions | {sum(questions.values())}: "
        + ", ".join(f"{count} {kind}" for kind, count in sorted(questions.items()))
        + " |",
        *(f"| {name} | {value:,} |" for name, value in searched.items()),
        *(
            f"| {name}: bytes sent, received | {both['sent']:,}, {both['received']:,} |"
            for name, both in result["bytes"].items()
        ),
        f"| seconds from the first question to the published model | "
        f"{result['seconds']['evolution']:.0f} |",
        "",
    ]
    write_bytes(path, "\n".join(lines).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="written with .json and .md")
    parser.add_argument("--keep", type=Path, help="folder to work in and to keep")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        root = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cooperative, base, members, traffic, meddler = federate(root)
        charter = cooperative.charter
        with cooperative.read_ledger() as ledger:
            admitted = load_admitted(ledger, cooperative.store)
        blocks = {m.name: load_corpus(ContributorHome(m.home).corpus).blocks for m in members}
        table, calm = evolve_undisturbed(root / "undisturbed", base, charter, admitted, blocks)
        pooled = evolve_pooled(root / "pooled", base, charter, admitted, blocks)
        one = read_evolution(cooperative.folder / "evolution")
        other = read_evolution(root / "undisturbed" / "evolution")
        found = search(traffic, blocks, base.tokenizer)
    seconds = meddler.seconds
    result = {
        "domains": list(DOMAINS),
        "settings": SETTINGS,
        "seed": SEED,
        "killed": meddler.kills,
        "files": {
            "compared": len(other),
            "equal": sum(one.get(name) == data for name, data in other.items()),
        },
        "questions": dict(Counter(table.asked)),
        "search": found,
        "bytes": {
            name: {way: sum(map(len, streams)) for way, streams in both.items()}
            for name, both in traffic.items()
        },
        "private": describe_fused(calm),
        "pooled": describe_fused(pooled),
        "generations": calm["generations"],
        "seconds": {"evolution": round(seconds["PUBLISHED"] - seconds["FUSING"], 1)},
    }
    write_json(arguments.out.with_suffix(".json"), result)
    write_page(arguments.out.with_suffix(".md"), result)
    print(arguments.out.with_suffix(".md").read_text())
    is_good = result["files"]["equal"] == len(one) == len(other) and not (
        found["pieces of text found"] or found["runs of token ids found"]
    )
    if not is_good:
        raise SystemExit("the result depends on kills, or text has crossed")


if __name__ == "__main__":
    main()
