"""What a run of `twenty` cost, read from its result, and its figures."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Costs", "draw_contributors", "draw_memory", "read_costs"]


@dataclass(frozen=True)
class Costs:
    """Processor seconds and bytes of memory.

    Attributes:
        first: The coordinator's seconds by stage for the first contributors.
        grown: The same for one more.
        contributors: Seconds of the first contributors, together.
        newcomer: Seconds of the one more.
        mail: Seconds of Flower and Ray for the first.
        mail_growth: The same for one more.
        wall: Wall-clock seconds for the first.
        wall_growth: The same for one more.
        memory: Largest memory of a fusion by number of experts, bytes.
        peak: Largest memory of the coordinator's process, bytes.
    """

    first: Mapping[str, float]
    grown: Mapping[str, float]
    contributors: float
    newcomer: float
    mail: float
    mail_growth: float
    wall: float
    wall_growth: float
    memory: Mapping[int, int]
    peak: int

    @property
    def coordinator(self) -> float:
        """The coordinator's seconds for the first contributors."""
        return sum(self.first.values())

    @property
    def growth(self) -> float:
        """The coordinator's seconds for one more."""
        return sum(self.grown.values())

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        own = {name: value for name, value in vars(self).items() if name != "memory"}
        return {**own, "memory": {str(count): peak for count, peak in self.memory.items()}}


def read_costs(result: Mapping[str, Any]) -> Costs:
    """The costs in a result of `run_twenty`."""
    first, grown = result["first"]["seconds"], result["grown"]["seconds"]
    spent = {
        name: sum(v for k, v in member["seconds"].items() if k != "received_bytes")
        for name, member in result["contributors"].items()
    }
    early = sum(seconds for name, seconds in spent.items() if name in result["first"]["states"])
    return Costs(
        first=first["coordinator"],
        grown=grown["coordinator"],
        contributors=early,
        newcomer=sum(spent.values()) - early,
        mail=first["mail"],
        mail_growth=grown["mail"],
        wall=first["wall"],
        wall_growth=grown["wall"],
        memory={
            int(count): found["peak_bytes"] for count, found in result["seconds"]["memory"].items()
        },
        peak=max(first["peak_bytes"], grown["peak_bytes"]),
    )


def draw_contributors(figure: Any, fusion: Mapping[str, Any]) -> None:
    """Losses of base, own specialist and fused model by domain, onto an empty figure."""
    losses = fusion["losses"]
    owner = {domain: name for name, domain in fusion["own_domain"].items()}
    domains = sorted(fusion["domains"], key=lambda domain: losses["base"][domain])
    figure.set_size_inches(8, 5)
    axes = figure.subplots()
    for label, marker, values in (
        ("base", "o", [losses["base"][d] for d in domains]),
        ("own specialist", "s", [losses["specialists"][owner[d]][d] for d in domains]),
        ("fused", "D", [losses["fused"]["evidence"][d] for d in domains]),
    ):
        axes.plot(values, range(len(domains)), linestyle="", marker=marker, label=label)
    axes.set_yticks(range(len(domains)), domains)
    axes.set_xlabel("held-out loss, nats per token")
    axes.legend()


def draw_memory(figure: Any, costs: Costs) -> None:
    """Memory by number of experts, onto an empty figure."""
    axes = figure.subplots()
    axes.plot(list(costs.memory), [peak / 2**20 for peak in costs.memory.values()], marker="o")
    axes.set_ylim(bottom=0)
    axes.set_xticks(list(costs.memory))
    axes.set_xlabel("experts")
    axes.set_ylabel("largest resident memory, MiB")
