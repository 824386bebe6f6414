"""The parts of a fused model: experts of one base and the router that mixes them.

`molora_fed.inference.fused_build.build_causal_lm` makes of them a model that reads and writes.
"""

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from molora_fed.adapters.updates import Adapter
from molora_fed.errors import RoutingError
from molora_fed.guard import guarded
from molora_fed.plugins import Entry
from molora_fed.routing.contract import OutputRouter
from molora_fed.types import Mixture

if TYPE_CHECKING:
    from molora_fed.models.base import Base

__all__ = ["FusedExpert", "FusedModel"]


@dataclass(frozen=True, eq=False)
class FusedExpert:
    """One expert of a fused model.

    Attributes:
        name: The contributor's name; "base" for the base itself.
        adapter: What it adds to the base; None for the base itself.
        domain: Domain it was trained on; None for the base.
        contribution: Contribution id; None for the base.
    """

    name: str
    adapter: Adapter | None
    domain: str | None = None
    contribution: str | None = None


@dataclass(frozen=True, eq=False)
class FusedModel:
    """Experts of one base with the router that mixes them.

    Attributes:
        base: The base checkpoint.
        experts: Experts in the order of the router's gates.
        router: The fitted router.
        router_name: Registered name of its class.
        mixture: How distributions are mixed.
        frozen_depth: K; the blocks all experts share with the base.
        entry: Who registered the router; None if it was made by hand.
    """

    base: "Base"
    experts: tuple[FusedExpert, ...]
    router: OutputRouter
    router_name: str
    mixture: Mixture
    frozen_depth: int
    entry: Entry | None = None

    def __post_init__(self) -> None:
        if len(self.experts) != self.router.num_experts:
            raise RoutingError(
                f"Cannot build fused model with router '{self.router_name}': expected "
                f"{self.router.num_experts} experts, got {len(self.experts)}. "
                "Fit the router on a bank of these experts."
            )

    def run_router(self) -> contextlib.AbstractContextManager[None]:
        """The guard that the router's code runs under."""
        return contextlib.nullcontext() if self.entry is None else guarded(self.entry, "gates")
