"""Two contributors evolve a population on texts that stay with them, through real processes."""

import json
import random
from dataclasses import dataclass, field

import pytest
from process_helpers import find_processes

from molora_fed.charter import (
    Amendment,
    CorpusRules,
    FusionRules,
    OperatorRules,
    PopulationRules,
    PrivacyRules,
    SampleRules,
    TrainingRules,
)
from molora_fed.contributions.receive import load_admitted
from molora_fed.contributions.states import CooperativeState
from molora_fed.cooperative.cooperative import create_cooperative
from molora_fed.cooperative.evolve import PrivateTexts, evolve_contributions
from molora_fed.corpus.prepare import load_corpus
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.local import LocalContributor, run_local
from molora_fed.models.base import load_base
from molora_fed.plugins import load_plugins
from molora_fed.population.bundle import load_evolved
from molora_fed.population.private_member import PrivateMember
from molora_fed.serving.addresses import find_free_port
from molora_fed.testing.models import Table
from molora_fed.testing.traffic import RecordingLine, find_text, find_tokens
from molora_fed.types import Split

pytestmark = pytest.mark.processes

WORDS = {"alpha": ("ka", "lo", "mi", "nu"), "beta": ("zz", "xx", "yy", "ww")}
TRAINING = TrainingRules(
    kind="lora", rank=4, steps=40, batch=4, validate_every=20, learning_rate=1e-2
)
RULES = PopulationRules(
    data="private", rank=4, slots=3, generations=3, rounds=1, start_steps=8, steps=8,
    learning_rate=3e-3, adaptation_share=0.4, fitness_share=0.2, guard_share=0.4,
    lifecycle=(
        OperatorRules(name="death", options={"threshold": 10.0, "patience": 1, "min_age": 1}),
        OperatorRules(name="slot-reallocation"),
        OperatorRules(name="inheritance"),
        OperatorRules(name="svd-mutation"),
    ),
)  # fmt: skip
AMENDMENT = Amendment(
    domains=tuple(WORDS), expected=2, training=TRAINING, population=RULES,
    fusion=FusionRules(mode="population"),
    samples=SampleRules(calibration=400, admission=4, held_out=60),
)  # fmt: skip


def write_text(folder, domain):
    draw = random.Random(domain)
    folder.mkdir(parents=True)
    for number in range(400):
        words = (draw.choice(WORDS[domain]) + str(draw.randrange(10)) for _ in range(20))
        (folder / f"{number:03d}.txt").write_text(" ".join(words))
    return folder


@dataclass(frozen=True)
class Member(LocalContributor):
    """Reaches its server over a line that records."""

    port: int = 0

    def take_part(self, server, on_event, stop):
        return super().take_part(f"127.0.0.1:{self.port}", on_event, stop)


def kill(home, module):
    """SIGKILL the worker of a home; whether there was one."""
    found = [p for p in find_processes(home) if module in p.cmdline()]
    for process in found:
        process.kill()
    return bool(found)


@dataclass
class Meddler:
    """Kills the coordinator's worker, then a contributor's, in the middle of generations."""

    root: object
    kills: list = field(default_factory=list)
    losses: list = field(default_factory=list)

    def __call__(self, event):
        if event.phase == "EVOLVING" and event.loss is not None:
            self.losses.append(event)
        if not event.contributor and "generation 1: adaptation" in event.message:
            self._kill_once("coordinator", self.root / "server")
        if not event.contributor and "generation 2: adaptation" in event.message:
            self._kill_once("worker", self.root / "alpha")

    def _kill_once(self, module, home):
        if module not in self.kills and kill(home, f"molora_fed.federation.{module}"):
            self.kills.append(module)


def read_evolution(folder):
    """Bytes of everything that must not depend on kills."""
    names = ("generations/*/*.json", "generations/*/*/*", "generations/*/*.safetensors")
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for name in names
        for path in sorted(folder.glob(name))
        if path.is_file() and "twin" not in path.parts and "lifecycle" not in path.parts
    }
    return {**found, "lineage": (folder / "lineage.jsonl").read_bytes()}


def test_a_population_evolves_on_private_texts(stage_root, tiny_checkpoint):
    base = load_base(tiny_checkpoint("gpt_neox"))
    cooperative = create_cooperative(
        stage_root / "server", "test", base, corpus=CorpusRules(block_size=32),
        amendment=AMENDMENT, privacy=PrivacyRules(mode="pooled"),
    )  # fmt: skip
    port = find_free_port()
    texts = {domain: write_text(stage_root / "text" / domain, domain) for domain in WORDS}
    meddler = Meddler(stage_root)
    with RecordingLine(port) as first, RecordingLine(port) as second:
        members = [
            Member(stage_root / d, JoinSettings(f"{d}-1", d, (texts[d],)), port=line.port)
            for d, line in zip(WORDS, (first, second), strict=True)
        ]
        answers = run_local(cooperative.folder, members, meddler, port=port, threads=1)
        streams = [*first.sent, *first.received, *second.sent, *second.received]
    assert meddler.kills == ["coordinator", "worker"]
    assert not meddler.losses  # that of a batch would be that of a few blocks
    assert {name: a["state"] for name, a in answers.items()} == {
        "alpha-1": "ADMITTED", "beta-1": "ADMITTED",
    }  # fmt: skip

    # The same population, byte for byte, as where nobody was disturbed.
    charter, plugins = cooperative.charter, load_plugins()
    homes = {member.settings.name: ContributorHome(member.home) for member in members}
    with cooperative.read_ledger() as ledger:
        assert ledger.cooperative_state == CooperativeState.PUBLISHED
        admitted = load_admitted(ledger, cooperative.store)
        verdicts = [event for event in ledger.events() if event.what == "generation-decided"]
    assert len(verdicts) == 4
    people = {
        one.manifest.contributor: PrivateMember(
            base, load_corpus(homes[one.manifest.contributor].corpus).blocks, charter,
            stage_root / "table" / one.manifest.contributor, threads=1, plugins=plugins,
        )
        for one in admitted
    }  # fmt: skip
    table = Table(stage_root / "table", people, charter, plugins)
    people_texts = PrivateTexts(charter, admitted, table, plugins=plugins)
    undisturbed = evolve_contributions(
        base, charter, people_texts, stage_root / "undisturbed", plugins=plugins
    ).result
    evolution = cooperative.folder / "evolution"
    assert read_evolution(evolution) == read_evolution(stage_root / "undisturbed")
    result = json.loads((evolution / "evolution.json").read_text())
    assert len(result["generations"]) == 4 and all(
        g["comparison"] for g in result["generations"][1:]
    )
    for name in ("losses", "equal_weight", "gain_percent", "fingerprints", "generations"):
        assert result[name] == json.loads(json.dumps(undisturbed[name]))

    # Every contributor has the evolved model, on the base it received itself.
    for member in members:
        model = load_evolved(member.home / "result" / "evolved")
        assert model.population.num_slots == 3
        assert (member.home / "result" / "report" / "population.html").is_file()

    # What crossed holds neither text nor token ids; the line did hear what was sent.
    for domain, home in zip(WORDS, homes.values(), strict=True):
        documents = [path.read_text() for path in sorted(texts[domain].iterdir())]
        assert not find_text(streams, documents)
        corpus = load_corpus(home.corpus)
        for split in Split:
            assert not find_tokens(streams, corpus.blocks[split].tokens)
        weights = (home.contribution / "adapter" / "adapter_model.safetensors").read_bytes()
        assert any(weights in stream for stream in streams)
        assert not (home.contribution / "samples").exists() or not list(
            (home.contribution / "samples").iterdir()
        )
    assert any(b"slot-0-less-fused" in stream for stream in (*first.sent, *second.sent))
