"""The router of contrib/molora-arrow, and one like it that changes what it is handed."""

import sys
from pathlib import Path

from molora_fed import hookimpl

sys.path.insert(0, str(Path(__file__).parents[1] / "contrib" / "molora-arrow"))
from molora_arrow.router import ArrowOptions, ArrowRouter

__all__ = ["ArrowOptions", "ArrowRouter", "Meddler", "register_routers"]


class Meddler(ArrowRouter):
    """Scales an adapter that it was handed."""

    @classmethod
    def learn(cls, bank, options, seed, progress):
        """Changes what is published, if it could."""
        adapter = next(each for each in bank.adapters.values() if each is not None)
        next(iter(adapter.updates.values())).tensors().popitem()[1].mul_(100)
        return super().learn(bank, options, seed, progress)


@hookimpl
def register_routers(register):
    """Register both."""
    for name, router in (("arrow", ArrowRouter), ("meddler", Meddler)):
        register(name, router, summary="A router for tests", source="arXiv 2405.11157")
