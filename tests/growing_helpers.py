"""A cooperative on disk with signed contributions that need no training, and a count of passes."""

from pathlib import Path

from fusion_helpers import BLOCK_SIZE, build_contributed

from molora_fed.bank.passes import ColumnMaker
from molora_fed.charter import (
    AdapterRules,
    Amendment,
    CorpusRules,
    FusionRules,
    PrivacyRules,
    SampleRules,
    TrainingRules,
)
from molora_fed.contributions.build import build_contribution, measure_start_loss
from molora_fed.cooperative.cooperative import create_cooperative
from molora_fed.storage.keys import load_or_make_key
from molora_fed.types import Split

SAMPLES = SampleRules(calibration=12, admission=6, held_out=12)
NAMES = {"law-1": "law", "art-1": "art", "law-2": "law", "war-1": "war"}


def found(folder, base, **fusion):
    """A cooperative without contributions."""
    rules = FusionRules(**{"compare": ("evidence-zero", "linear"), **fusion})
    return create_cooperative(
        folder,
        "growing",
        base,
        adapters=AdapterRules(frozen_depth=1),
        corpus=CorpusRules(block_size=BLOCK_SIZE, evaluation_batch=8),
        amendment=Amendment(samples=SAMPLES, fusion=rules, training=TrainingRules(rank=4), seed=7),
        privacy=PrivacyRules(mode="pooled"),
    )


def contribute(cooperative, base, folder, name, *, seed, domain=None) -> Path:
    """The folder of a contribution with text drawn from its own random specialist."""
    domain = domain or NAMES[name]
    made = build_contributed(base, folder / "adapters", name, domain, seed=seed)
    samples = {
        Split.CALIBRATION: made.calibration,
        Split.ADMISSION: made.admission,
        Split.HELD_OUT: made.held_out,
    }
    charter = cooperative.charter
    build_contribution(
        folder / name,
        adapter=made.adapter,
        kind="lora",
        samples=samples,
        key=load_or_make_key(folder / "keys" / f"{name}.pem"),
        charter=charter,
        contributor=name,
        domain=domain,
        training=made.training,
        base_loss=3.0,
        specialist_loss=2.0,
        start_loss=measure_start_loss(base.model, samples, charter, domain=domain),
    )
    return folder / name


class Passes:
    """Counts the passes of every model over every list of blocks; `with` nothing, it just counts.

    Attributes:
        done: (hash of the adapter that ran, fingerprint of the blocks), in order.
    """

    def __init__(self, monkeypatch):
        self.done = []
        run, subtract = ColumnMaker.run, ColumnMaker.subtract

        def count_run(maker, what, order, work, *, progress=None, **more):
            self.done.append((work.own, maker.blocks.fingerprint))
            return run(maker, what, order, work, progress=progress, **more)

        def count_subtract(maker, own, *, progress=None):
            self.done.append((own, maker.blocks.fingerprint))
            return subtract(maker, own, progress=progress)

        monkeypatch.setattr(ColumnMaker, "run", count_run)
        monkeypatch.setattr(ColumnMaker, "subtract", count_subtract)

    def take(self):
        """What was done since the last call."""
        done, self.done = self.done, []
        return done
