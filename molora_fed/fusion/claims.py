"""What members measure of one another's adapters, where no sample comes along to measure them on.

A manifest states losses on text that nobody else has. Up to three members, drawn by a hash that
both ends compute, measure the adapter and the base on their own calibration text; those of its
domain are drawn first. No single one of them can have an adapter left out.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from molora_fed.evaluation.composition import name_specialist
from molora_fed.evaluation.moments import MIN_CLUSTERS
from molora_fed.evaluation.summed import measure_alone
from molora_fed.storage.files import hash_bytes
from molora_fed.storage.settings import UntrustedModel

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = [
    "ABSURD_RISE",
    "MAX_MEASURERS",
    "Claim",
    "draw_measurers",
    "find_disagreement",
    "list_drawn",
    "measure_claims",
]

MAX_MEASURERS = 3
ABSURD_RISE = 3.0
"""Nats above the base on other people's text; training on one domain costs less on others."""
_MIN_AGREEING = 2

Loss = Annotated[float, Field(ge=0.0, le=1e3)]


class Claim(UntrustedModel):
    """What one member measured of another's adapter.

    Attributes:
        base: Loss of the base on its calibration text, nats per token.
        loss: Loss with the adapter.
        clusters: Document clusters of that text.
    """

    base: Loss
    loss: Loss
    clusters: Annotated[int, Field(ge=MIN_CLUSTERS, le=2**40)]

    def to_json(self, domain: str) -> dict[str, Any]:
        """JSON values for the report."""
        return {"domain": domain, "base": self.base, "loss": self.loss, "clusters": self.clusters}


def draw_measurers(fusion: str, domains: Mapping[str, str], whom: str) -> tuple[str, ...]:
    """Who measures an adapter: members of its domain first, each group in the order of a hash.

    Args:
        fusion: Id of the fusion, which nobody chooses.
        domains: Domain of each member by name.
        whom: Whose adapter it is.
    """
    others = [name for name in domains if name != whom]
    return tuple(
        sorted(
            others,
            key=lambda name: (
                domains[name] != domains[whom],
                hash_bytes(f"{fusion} {whom} {name}".encode()),
            ),
        )[:MAX_MEASURERS]
    )


def list_drawn(fusion: str, domains: Mapping[str, str], who: str) -> tuple[str, ...]:
    """Whose adapters a member measures, sorted."""
    return tuple(
        sorted(w for w in domains if w != who and who in draw_measurers(fusion, domains, w))
    )


def measure_claims(bank: "CalibrationBank", names: Sequence[str], *, who: str) -> dict[str, Claim]:
    """A member's side: losses of some experts on its own calibration text.

    Args:
        bank: Of its own blocks alone.
        names: The experts.
        who: The member, for errors.

    Raises:
        SumError: If there are too few document clusters.
    """
    if not names:
        return {}
    moments = measure_alone(bank, who=who)
    return {
        name: Claim(
            base=moments.mean("base"),
            loss=moments.mean(name_specialist(name)),
            clusters=moments.clusters,
        )
        for name in names
    }


def find_disagreement(whom: str, domain: str, claims: Mapping[str, tuple[str, Claim]]) -> str:
    """What speaks against an adapter; empty if nothing does, or a single member alone.

    Args:
        whom: Whose adapter it is.
        domain: Its domain.
        claims: Domain and finding of each member that measured it, by name.
    """
    own = {name: one for name, (theirs, one) in claims.items() if theirs == domain}
    worse = {name: one for name, one in own.items() if one.loss >= one.base}
    if len(worse) >= _MIN_AGREEING and 2 * len(worse) > len(own):
        return (
            f"expected losses below the base's on text of '{domain}', where '{whom}' states a "
            f"gain, got {_quote(worse)}"
        )
    absurd = {n: one for n, (_, one) in claims.items() if one.loss > one.base + ABSURD_RISE}
    if len(absurd) >= _MIN_AGREEING and 2 * len(absurd) > len(claims):
        return (
            f"expected losses at most {ABSURD_RISE:g} nats above the base's on other members' "
            f"text, got {_quote(absurd)}"
        )
    return ""


def _quote(claims: Mapping[str, Claim]) -> str:
    return ", ".join(
        f"{one.loss:.3f} against {one.base:.3f} nats by '{name}'"
        for name, one in sorted(claims.items())
    )
