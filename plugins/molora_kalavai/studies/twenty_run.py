"""The work of the study `twenty`: a whole simulated federation, and what it costs."""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from molora_fed.charter import AdapterRules, Amendment, FusionRules, SampleRules, TrainingRules
from molora_fed.cooperative import Cooperative, create_cooperative
from molora_fed.federation.events import FederationEvent
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.local import LocalContributor
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.records import describe_folder
from molora_fed.federation.simulation import run_simulated
from molora_fed.files import canonical_json, hash_bytes, write_bytes, write_json
from molora_fed.specialists import load_specialist
from molora_fed.studies.actions import open_base
from molora_fed.studies.contract import TaskContext
from molora_kalavai.studies.twenty_memory import measure_memory

__all__ = ["run_twenty"]

_KEPT = ("domains", "losses", "equal_weight", "gain_percent", "gain_interval_percent",
         "baseline_gain_percent", "best_alone", "best_specialist", "oracle_gap_nats", "guard",
         "forecasts", "own_domain", "contamination")  # fmt: skip


@dataclass(frozen=True)
class _Stage:
    """A cooperative with its contributors on disk.

    Attributes:
        folder: Holds everything.
        cooperative: The coordinator's.
        context: Of the task.
    """

    folder: Path
    cooperative: Cooperative
    context: TaskContext

    def home(self, domain: str) -> ContributorHome:
        """The home of the contributor of a domain."""
        return ContributorHome(self.folder / "contributors" / domain)

    def run(self, name: str, domains: Sequence[str], seed: int) -> dict[str, Any]:
        """Run the federation with a contributor a domain until all have the fused model.

        Args:
            name: Under which the outcome is kept; a finished one is read.
            domains: One contributor each.
            seed: Of the contributors' keys.

        Returns:
            What came out and what it cost; costs are this run's alone.
        """
        kept = self.folder / f"{name}.json"
        found = read_json(kept)
        if found is not None:
            return dict(found)
        for domain in domains:
            _make_key(self.home(domain).key, f"{seed} {domain}")
        before = read_json(self.cooperative.folder / "usage.json") or {}
        start = time.monotonic()
        outcome = run_simulated(
            self.cooperative.folder,
            [LocalContributor(domain, domain, self.home(domain).root) for domain in domains],
            self._tell(domains),
            threads=1,
        )
        wall = time.monotonic() - start
        after = read_json(self.cooperative.folder / "usage.json")
        spent = {
            stage: seconds - before.get("seconds", {}).get(stage, 0.0)
            for stage, seconds in after["seconds"].items()
        }
        result = read_json(self.cooperative.folder / "result.json")
        measured = {
            "states": {n: a["state"] for n, a in sorted(outcome.acknowledgements.items())},
            "fusion": {key: _without_times(result[key]) for key in _KEPT},
            "seconds": {
                "wall": wall,
                "coordinator": spent,
                "fusion": result["seconds"],
                "mail": outcome.mail_seconds,
                "peak_bytes": after["peak_bytes"],
            },
        }
        write_json(kept, measured)
        return measured

    def _tell(self, domains: Sequence[str]) -> Any:
        """Turns events into the task's progress: half for contributions, half for the bank."""
        states: dict[str, str] = {}
        report = self.context.progress

        def observe(event: FederationEvent) -> None:
            if event.problem:
                print(event.message, flush=True)
            if event.contributor:
                states[event.contributor] = event.phase
            if report is not None:
                far = {"SUBMITTED": 1, "ADMITTED": 2, "DONE": 3}
                report(sum(far.get(phase, 0) for phase in states.values()), 3 * len(domains))

        return observe

    def measure_contributor(self, domain: str) -> dict[str, Any]:
        """What one contributor trained, sent and received, and what that cost it."""
        home = self.home(domain)
        (training,) = home.training.iterdir()
        specialist = load_specialist(training)
        sent = {entry.name: entry.num_bytes for entry in describe_folder(home.contribution).files}
        usage = read_json(home.usage_file)
        return {
            "base_loss": specialist.base_loss,
            "loss": specialist.loss,
            "steps": specialist.record["steps"],
            "bytes": {
                "adapter": sum(n for name, n in sent.items() if name.startswith("adapter/")),
                "samples": sum(n for name, n in sent.items() if name.startswith("samples/")),
                "sent": sum(sent.values()),
            },
            "seconds": {
                **usage["seconds"],
                "received_bytes": sum(
                    describe_folder(folder).num_bytes for folder in (home.base, home.result)
                ),
            },
        }


def run_twenty(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Found a cooperative, run its contributors, let another join, measure the memory.

    Settings are `domains`, `newcomer`, `training` (as `TrainingRules`), `samples` (as
    `SampleRules`), `memory` (numbers of experts), `seed`; the only need is the base.
    """
    folder = context.folder / "work"
    stage = _Stage(folder, _found(settings, context, folder), context)
    domains, newcomer, seed = settings["domains"], settings["newcomer"], settings["seed"]
    first = stage.run("first", domains, seed)
    grown = stage.run("grown", [*domains, newcomer], seed)
    memory = {
        str(count): measure_memory(stage.cooperative.folder, folder / "memory" / str(count), count)
        for count in settings["memory"]
    }
    result = {
        "first": first,
        "grown": grown,
        "contributors": {
            domain: stage.measure_contributor(domain) for domain in (*domains, newcomer)
        },
        "seconds": {"memory": memory},
    }
    shutil.rmtree(folder)
    return result


def _found(settings: Mapping[str, Any], context: TaskContext, folder: Path) -> Cooperative:
    training = TrainingRules.model_validate(settings["training"])
    return create_cooperative(
        folder / "coordinator",
        "twenty",
        open_base(context.needs[0]),
        adapters=AdapterRules(kinds=(training.kind,)),
        amendment=Amendment(
            # The newcomer is asked for from the start; nobody waits for it.
            domains=(*settings["domains"], settings["newcomer"]),
            expected=len(settings["domains"]),
            seed=settings["seed"],
            training=training,
            samples=SampleRules.model_validate(settings["samples"]),
            fusion=FusionRules(compare=()),
        ),
    )


def _make_key(path: Path, seed: str) -> None:
    """A contributor's key that is the same in every run, so that experts keep their order.

    Nobody but this study may make keys so: whoever knows the seed has the key.
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
