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
        resident: Largest resident memory of a fusion by number of experts, bytes.
        private: The same without pages of mapped files.
        peak: Largest resident memory of the coordinator's process, bytes.
    """

    first: Mapping[str, float]
    grown: Mapping[str, float]
    contributors: float
    newcomer: float
    mail: float
    mail_growth: float
    wall: float
    wall_growth: float
    resident: Mapping[int, int]
    private: Mapping[int, int]
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
        return {
            name: {str(key): item for key, item in value.items()}
            if isinstance(value, Mapping)
            else value
            for name, value in vars(self).items()
        }


def read_costs(result: Mapping[str, Any]) -> Costs:
    """The costs in a result of `run_twenty`."""
    first, grown = result["first"]["seconds"], result["grown"]["seconds"]
    before, after = (stage["coordinator"]["seconds"] for stage in (first, grown))
    spent = {
        name: sum(member["seconds"]["processor"].values())
        for name, member in result["contributors"].items()
    }
    early = sum(seconds for name, seconds in spent.items() if name in result["first"]["states"])
    memory = sorted(result["seconds"]["memory"].items(), key=lambda item: int(item[0]))
    return Costs(
        first=before,
        grown={stage: seconds - before.get(stage, 0.0) for stage, seconds in after.items()},
        contributors=early,
        newcomer=sum(spent.values()) - early,
        mail=first["mail"],
        mail_growth=grown["mail"],
        wall=first["wall"],
        wall_growth=grown["wall"],
        resident={int(count): found["peak_bytes"] for count, found in memory},
        private={int(count): found["private_bytes"] for count, found in memory},
        peak=grown["coordinator"]["peak_bytes"],
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
    for label, marker, memory in (
        ("resident", "o", costs.resident),
        ("without pages of mapped files", "s", costs.private),
    ):
        sizes = [size / 2**20 for size in memory.values()]
        axes.plot(list(memory), sizes, marker=marker, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xticks(list(costs.resident))
    axes.set_xlabel("experts")
    axes.set_ylabel("largest memory, MiB")
    axes.legend()
