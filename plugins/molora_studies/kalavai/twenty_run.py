"""The work of the study `twenty`: a whole simulated federation, and what it costs."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from molora_fed.charter import (
    AdapterRules,
    Amendment,
    FusionRules,
    PrivacyRules,
    SampleRules,
    TrainingRules,
)
from molora_fed.contributions.manifest import load_contribution
from molora_fed.cooperative.cooperative import Cooperative, create_cooperative
from molora_fed.corpus.overlap import find_base_index, index_blocks, save_index
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.local import LocalContributor, note_known_text
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.messages import describe_folder
from molora_fed.federation.simulation import SimulationSupervisor
from molora_fed.federation.status import FederationEvent
from molora_fed.federation.supervise import sigterm_as_interrupt
from molora_fed.storage.files import canonical_json, hash_bytes, write_bytes, write_json
from molora_fed.training.adapter_job import load_specialist
from molora_fed.types import Split
from molora_studies.framework.actions import open_base, open_corpus
from molora_studies.framework.contract import TaskContext
from molora_studies.kalavai.twenty_memory import measure_memory

__all__ = ["run_twenty"]

_KEPT = ("domains", "router", "losses", "equal_weight", "gain_percent", "gain_interval_percent",
         "baseline_gain_percent", "best_alone", "best_specialist", "oracle_gap_nats", "guard",
         "forecasts", "own_domain", "contamination", "overlap")  # fmt: skip
_POLL_SECONDS = 0.3
_STEPS_OF = {"SUBMITTED": 1, "ADMITTED": 2, "DONE": 3}


@dataclass(frozen=True)
class _Stage:
    """A cooperative with its contributors on disk.

    Attributes:
        folder: Holds everything.
        cooperative: The coordinator's.
    """

    folder: Path
    cooperative: Cooperative

    def home(self, domain: str) -> ContributorHome:
        """The home of the contributor of a domain."""
        return ContributorHome(self.folder / "contributors" / domain)

    def member(self, domain: str) -> LocalContributor:
        """The contributor of a domain; it has the domain's name."""
        return LocalContributor(self.home(domain).root, JoinSettings(domain, domain))

    def federate(self, domains: Sequence[str], newcomer: str, report: Callable[..., None]) -> None:
        """Run the federation until all have the fused model, then until the newcomer has it.

        What came out of both is kept in `first.json` and `grown.json`; stopped and called again
        it goes on, and its seconds are those of all runs but the waiting in between.
        """
        supervisor = SimulationSupervisor(
            self.cooperative.folder,
            [self.member(domain) for domain in domains],
            _tell(report, 3 * (len(domains) + 1)),
            threads=1,
            reserve=1,
        )
        with sigterm_as_interrupt(), supervisor:
            self._run(supervisor, "first")
            supervisor.join(self.member(newcomer))
            self._run(supervisor, "grown")

    def _run(self, supervisor: SimulationSupervisor, name: str) -> None:
        """Poll until everyone is done, and keep what that gave and cost."""
        start, mail = time.monotonic(), supervisor.outcome.mail_seconds
        while not supervisor.is_finished:
            supervisor.poll()
            time.sleep(_POLL_SECONDS)
        outcome, kept = supervisor.outcome, self.folder / f"{name}.json"
        if kept.exists():
            return  # by a run that was stopped later
        result = read_json(self.cooperative.folder / "result.json")
        measured = {
            "states": {n: a["state"] for n, a in sorted(outcome.acknowledgements.items())},
            "fusion": {key: _without_times(result[key]) for key in _KEPT},
            "seconds": {
                "wall": time.monotonic() - start,
                "coordinator": read_json(self.cooperative.folder / "usage.json"),
                "fusion": result["seconds"],
                "mail": outcome.mail_seconds - mail,
            },
        }
        write_json(kept, measured)

    def measure_contributor(self, domain: str) -> dict[str, Any]:
        """What one contributor trained and sent, and what that cost it."""
        home = self.home(domain)
        (training,) = home.training.iterdir()
        specialist = load_specialist(training)
        sent = {entry.name: entry.num_bytes for entry in describe_folder(home.contribution).files}
        usage = read_json(home.usage_file)
        samples = load_contribution(home.contribution).manifest.sample_files
        received = (home.base, home.result)
        return {
            "base_loss": specialist.base_loss,
            "loss": specialist.loss,
            "steps": specialist.record["steps"],
            "blocks": {str(split): sample.blocks for split, sample in samples.items()},
            "bytes": {
                "adapter": sum(n for name, n in sent.items() if name.startswith("adapter/")),
                "samples": sum(n for name, n in sent.items() if name.startswith("samples/")),
                "sent": sum(sent.values()),
            },
            "seconds": {
                "processor": usage["seconds"],
                # Here because the report in it holds times, whose length is no figure.
                "received_bytes": sum(describe_folder(path).num_bytes for path in received),
            },
        }


def run_twenty(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Found a cooperative, run its contributors, let another join, measure the memory.

    Settings are `domains`, `newcomer`, `training` (as `TrainingRules`), `samples` (as
    `SampleRules`), `memory` (numbers of experts), `seed`; the needs are the base, then the corpora
    it was trained on.
    """
    folder = context.folder / "work"
    stage = _Stage(folder, _found(settings, context, folder))
    everyone = (*settings["domains"], settings["newcomer"])
    for domain in everyone:
        _make_key(stage.home(domain).key, f"{settings['seed']} {domain}")
    note_known_text(stage.cooperative.folder, map(stage.member, everyone))
    if not (folder / "grown.json").exists():
        stage.federate(
            settings["domains"], settings["newcomer"], context.progress or (lambda *_: None)
        )
    memory = {
        str(count): measure_memory(stage.cooperative.folder, folder / "memory" / str(count), count)
        for count in settings["memory"]
    }
    grown = read_json(folder / "grown.json") or {}
    result = {
        "overlap": grown["fusion"]["overlap"]["domains"],
        "first": read_json(folder / "first.json"),
        "grown": grown,
        "contributors": {domain: stage.measure_contributor(domain) for domain in everyone},
        "seconds": {"memory": memory},
    }
    shutil.rmtree(folder)
    return result


def _tell(report: Callable[..., None], total: int) -> Callable[[FederationEvent], None]:
    """Turns events into progress: three steps a contributor."""
    phases: dict[str, str] = {}

    def observe(event: FederationEvent) -> None:
        if event.problem:
            print(event.message, flush=True)
        if event.contributor:
            phases[event.contributor] = event.phase
        report(sum(_STEPS_OF.get(phase, 0) for phase in phases.values()), total)

    return observe


def _found(settings: Mapping[str, Any], context: TaskContext, folder: Path) -> Cooperative:
    training = TrainingRules.model_validate(settings["training"])
    base = open_base(context.needs[0])
    index = find_base_index(folder / "coordinator" / "base")
    if context.needs[1:] and not index.exists():
        texts = [
            index_blocks(open_corpus(done).blocks[Split.TRAIN], base.tokenizer)
            for done in context.needs[1:]
        ]
        save_index(index, np.unique(np.concatenate(texts)), (base.training or {})["recipe"])
    return create_cooperative(
        folder / "coordinator",
        "twenty",
        base,
        adapters=AdapterRules(kinds=(training.kind,)),
        amendment=Amendment(
            # The newcomer is asked for from the start; nobody waits for it.
            domains=(*settings["domains"], settings["newcomer"]),
            expected=len(settings["domains"]),
            seed=settings["seed"],
            training=training,
            samples=SampleRules.model_validate(settings["samples"]),
            fusion=FusionRules(compare=(), merges=()),
        ),
        privacy=PrivacyRules(mode="pooled"),
    )


def _make_key(path: Path, seed: str) -> None:
    """A contributor's key that is the same in every run, so that experts keep their order.

    For a study only: whoever knows the seed has the key.
    """
    if path.exists():
        return
    number = int(hash_bytes(canonical_json(["twenty", seed])), 16)
    pem = ec.derive_private_key(number, ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    write_bytes(path, pem, mode=0o600)


def _without_times(value: Any) -> Any:
    """The same without the times at which forecasts were written down."""
    if isinstance(value, dict):
        return {key: _without_times(inner) for key, inner in value.items() if key != "created"}
    return value
