"""A cooperative on disk with signed contributions that need no training, and a count of passes."""

from pathlib import Path

from molora_fed.bank.passes import ColumnMaker
from molora_fed.testing.cooperatives import build_tiny_contribution, found_tiny_cooperative

NAMES = {"law-1": "law", "art-1": "art", "law-2": "law", "war-1": "war"}


def found(folder, base, **fusion):
    """A cooperative without contributions."""
    return found_tiny_cooperative(
        folder, base, **{"compare": ("evidence-zero", "linear"), **fusion}
    )


def contribute(cooperative, base, folder, name, *, seed, domain=None) -> Path:
    """The folder of a contribution with text drawn from its own random specialist."""
    domain = domain or NAMES[name]
    return build_tiny_contribution(cooperative, base, folder, name, domain, seed=seed).folder


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
