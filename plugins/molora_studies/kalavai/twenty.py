"""Twenty contributors, and one more, through Flower's simulation on one machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from molora_fed.charter import SampleRules, TrainingRules
from molora_studies.framework.contract import (
    Cell,
    Claim,
    Figure,
    Study,
    StudyOptions,
    Summary,
    Table,
    Task,
)
from molora_studies.framework.substrate import BaseSettings, plan_base, plan_base_text
from molora_studies.verdicts import Span, compute_span, judge_above, judge_below, name_unit

__all__ = ["TWENTY_DOMAINS", "TwentyOptions", "TwentyStudy"]


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


def find_router(fusion: Mapping[str, Any]) -> str:
    """The router that a federation published; results of an earlier version do not name it."""
    return str(fusion.get("router", "evidence"))


def _read(fusion: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A figure of the published router."""
    return dict(fusion[name][find_router(fusion)])


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
        ("fused", "D", [losses["fused"][find_router(fusion)][d] for d in domains]),
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


TWENTY_DOMAINS = (
    "docstrings-matplotlib", "docstrings-networkx", "docstrings-ray", "docstrings-sqlalchemy",
    "docstrings-sympy", "docstrings-torch", "docstrings-transformers", "headers-c10",
    "headers-python", "library-concurrency", "library-network", "library-tools", "man-de",
    "man-fr", "man-it", "man-nl", "man-ru", "man-sv", "man-uk", "readme",
)  # fmt: skip
"""One contributor each; every machine with the package has them but the languages, which are
manual pages. Name others in the study's file where a machine lacks some."""

_PUBLISHED_GAIN = 16.71  # arXiv 2603.22755, Pythia-1B, percent over the best specialist
_PUBLISHED_DIVERGENCE = 15.68
_FLAT = 1.10  # largest memory at the most experts, of that at the fewest
_GROWTH = 0.10


class TwentyOptions(StudyOptions):
    """Options.

    Attributes:
        seeds: Seeds of training, keys and routers; a whole federation each.
        domains: One contributor each.
        newcomer: Domain of the one who joins after the first fusion; the default has less text
            than the others, and sends a third of their blocks.
        base: The base everyone shares.
        training: How contributors train.
        samples: Blocks each contributor sends.
        memory: Numbers of experts at which a fusion's memory is measured.
    """

    seeds: tuple[int, ...] = (42,)
    domains: tuple[str, ...] = Field(default=TWENTY_DOMAINS, min_length=2)
    newcomer: str = "man-da"
    base: BaseSettings = BaseSettings()
    training: TrainingRules = TrainingRules(kind="svd", rank=16, steps=200, validate_every=50)
    samples: SampleRules = SampleRules(calibration=80, admission=16, held_out=80)
    memory: tuple[int, ...] = Field(default=(5, 10, 20), min_length=2)


class TwentyStudy(Study):
    """A whole federation end to end: what it gains, and what it costs whom."""

    Options: ClassVar[type[StudyOptions]] = TwentyOptions
    title: ClassVar[str] = "Twenty contributors on one machine, and a twenty-first"
    measures: ClassVar[tuple[str, ...]] = ("molora_kalavai",)

    @classmethod
    def plan(cls, options: TwentyOptions) -> Sequence[Cell]:
        """A cell a seed; each keeps all cores busy by itself."""
        base = plan_base(options.base)
        count = len(options.domains)
        blocks = options.samples.calibration + options.samples.held_out
        return [
            Cell(
                f"seed {seed}",
                {"seed": seed, "contributors": count},
                Task(
                    name=f"{count} contributors and one more, seed {seed}",
                    action="run-twenty",
                    settings={
                        "domains": list(options.domains),
                        "newcomer": options.newcomer,
                        "training": options.training.model_dump(mode="json"),
                        "samples": options.samples.model_dump(mode="json"),
                        "memory": list(options.memory),
                        "seed": seed,
                    },
                    needs=(base, *plan_base_text(base)),
                    version=2,
                    seconds=90 + count * (0.05 * options.training.steps + 0.006 * blocks * count),
                ),
            )
            for seed in options.seeds
        ]

    @classmethod
    def summarise(cls, options: TwentyOptions, results: Mapping[str, Mapping[str, Any]]) -> Summary:
        """What the federations gained and cost; tables show the first seed's."""
        every = [results[f"seed {seed}"] for seed in options.seeds]
        result = every[0]
        costs = read_costs(result)
        return Summary(
            findings={
                name: {"gain_percent": _gain(found), "divergence_percent": _divergence(found)}
                for name, found in results.items()
            }
            | {"seconds": costs.to_json()},
            claims=[
                _claim_gain(options, every),
                _claim_law(every),
                _claim_memory([read_costs(each) for each in every]),
                _claim_growth(
                    options,
                    [read_costs(each) for each in every],
                    {n: m["blocks"] for n, m in result["contributors"].items()},
                ),
            ],
            tables=[
                _build_costs_table(options, costs),
                _build_memory_table(costs),
                _build_contributors_table(options, result),
            ],
            figures=[
                Figure(
                    "losses",
                    "Held-out loss of every domain: the base, its own specialist, the fused model.",
                    lambda figure: draw_contributors(figure, result["first"]["fusion"]),
                ),
                Figure(
                    "memory",
                    "Largest memory of a process that fuses, by its number of experts.",
                    lambda figure: draw_memory(figure, costs),
                ),
            ],
            notes=[
                "Seconds are processor time, all threads together, with one thread for the "
                "coordinator and one worker a core for the contributors; only the wall clock "
                "depends much on what else the machine does.",
                "The base has read parts of the areas of the standard library and of the C++ "
                "headers, less than once; held-out blocks that lie in what it has read are left "
                "out, as the table of contamination says.",
                "The fused model reaches all contributors, so what each receives grows with "
                "their number; what each sends does not.",
            ],
        )


def _gain(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        stage: {
            "point": _read(result[stage]["fusion"], "gain_percent"),
            "interval": _read(result[stage]["fusion"], "gain_interval_percent"),
        }
        for stage in ("first", "grown")
    }


def _divergence(result: Mapping[str, Any]) -> float:
    """Mean over the twenty of how far each specialist is below the base on its own text."""
    found = [
        100.0 * (member["base_loss"] - member["loss"]) / member["base_loss"]
        for name, member in result["contributors"].items()
        if name in result["first"]["states"]
    ]
    return sum(found) / len(found)


def _show_gain(result: Mapping[str, Any], reference: str) -> str:
    fusion = result["first"]["fusion"]
    point = _read(fusion, "gain_percent")[reference]
    interval = _read(fusion, "gain_interval_percent")[reference]
    return f"{point:+.2f} % [{interval['low']:+.2f}, {interval['high']:+.2f}]"


_ALONE = "one federation is no interval: not decided over trainings"


def _name_federations(count: int) -> str:
    return name_unit("federation, each a training of its own", count)


def _explain(why: str, count: int) -> str:
    return why if count > 1 else f"{why}; {_ALONE}"


def _claim_gain(options: TwentyOptions, results: Sequence[Mapping[str, Any]]) -> Claim:
    fusions = [result["first"]["fusion"] for result in results]
    gains = [_read(fusion, "gain_percent")["vs_best_alone"] for fusion in fusions]
    documents = [
        Span.of(_read(fusion, "gain_interval_percent")["vs_best_alone"]) for fusion in fusions
    ]
    first = results[0]
    return Claim(
        "Many contributors who each train alone gain from fusing",
        f"{_PUBLISHED_GAIN:+.2f} % on the best specialist, mean divergence "
        f"{_PUBLISHED_DIVERGENCE:.2f} %, 20 contributors, Pythia-1B",
        f"{_show_gain(first, 'vs_best_specialist')} on the best specialist, "
        f"{_show_gain(first, 'vs_best_alone')} on the best alone over documents, mean divergence "
        f"{_divergence(first):.2f} %, {len(options.domains)} contributors, {_count_seeds(results)}",
        judge_above([compute_span(gains), *documents]),
        f"{_name_federations(len(results))}, and document cluster at every seed",
        _explain(
            "holds if the intervals against the best alone, over federations and by document "
            "cluster, lie above 0",
            len(results),
        ),
    )


def _count_seeds(results: Sequence[Mapping[str, Any]]) -> str:
    return "1 seed" if len(results) == 1 else f"the first of {len(results)} seeds"


def _claim_law(results: Sequence[Mapping[str, Any]]) -> Claim:
    every = [result["first"]["fusion"]["forecasts"] for result in results]
    missed = [each["kalavai-law"]["actual"] - each["kalavai-law"]["point"] for each in every]
    law, own = every[0]["kalavai-law"], every[0]["own-loss"]
    return Claim(
        "The law 0.82·d − 2.72 forecasts too little for twenty contributors",
        "+6.4 pp missed",
        f"{missed[0]:+.1f} pp missed by the law ({law['point']:+.1f} % forecast, "
        f"{law['actual']:+.1f} % measured); {own['actual'] - own['point']:+.1f} pp by own-loss, "
        f"{_count_seeds(results)}",
        judge_above([compute_span(missed)]),
        _name_federations(len(results)),
        _explain("both forecasts were in the ledger before the routers were fitted", len(results)),
    )


def _claim_memory(every: Sequence[Costs]) -> Claim:
    costs = every[0]
    fewest, most = min(costs.private), max(costs.private)

    def show(memory: Mapping[int, int]) -> str:
        return f"{memory[fewest] / 2**20:.0f} to {memory[most] / 2**20:.0f} MiB"

    ratios = [each.private[most] / each.private[fewest] for each in every]
    return Claim(
        "The coordinator's memory does not grow with the number of experts",
        "not published; an aim of ours",
        f"{show(costs.private)} from {fewest} to {most} experts; {show(costs.resident)} with the "
        "mapped columns that the system takes back when it needs them",
        judge_below([compute_span(ratios)], _FLAT),
        _name_federations(len(every)),
        _explain(
            f"holds up to {100 * (_FLAT - 1):.0f} % more without mapped columns; every fusion with "
            "its report in a fresh process, on the blocks of all its contributors, so that the "
            "number of blocks grows with the experts",
            len(every),
        ),
    )


def _claim_growth(
    options: TwentyOptions, every: Sequence[Costs], blocks: Mapping[str, Mapping[str, int]]
) -> Claim:
    def count(domain: str) -> int:
        return blocks[domain]["calibration"] + blocks[domain]["held-out"]

    costs = every[0]
    shares = [each.growth / each.coordinator for each in every]
    return Claim(
        "One more contributor costs the coordinator less than a tenth of what the others did",
        "not published; an aim of ours",
        f"{costs.growth:.0f} s after {costs.coordinator:.0f} s for the first "
        f"{len(options.domains)}: {100 * costs.growth / costs.coordinator:.1f} %",
        judge_below([compute_span(shares)], _GROWTH),
        _name_federations(len(every)),
        _explain(
            "processor time of the coordinator's worker, which keeps running; the newcomer brings "
            f"a domain of its own with {count(options.newcomer)} blocks, the others "
            f"{count(options.domains[0])} each. With as many, its specialist on everybody's blocks "
            f"and everybody's on its own alone cost 2/{len(options.domains)} of the first bank",
            len(every),
        ),
    )


def _build_costs_table(options: TwentyOptions, costs: Costs) -> Table:
    count = len(options.domains)
    rows = [
        (what, f"{costs.first.get(stage, 0.0):.1f}", f"{costs.grown.get(stage, 0.0):.1f}")
        for what, stage in (
            ("coordinator: start", "start"),
            ("coordinator: loading libraries and base", "loading"),
            ("coordinator: looking into mailboxes", "looking"),
            ("coordinator: admission", "admission"),
            ("coordinator: fusion", "fusion"),
        )
    ]
    rows += [
        ("coordinator, all", f"{costs.coordinator:.1f}", f"{costs.growth:.1f}"),
        ("mail: Flower and Ray", f"{costs.mail:.1f}", f"{costs.mail_growth:.1f}"),
        ("contributors, all", f"{costs.contributors:.1f}", f"{costs.newcomer:.1f}"),
        ("contributor, mean", f"{costs.contributors / count:.1f}", f"{costs.newcomer:.1f}"),
        ("wall clock", f"{costs.wall:.0f}", f"{costs.wall_growth:.0f}"),
    ]
    return Table("Seconds", ("", f"the first {count}", "one more"), rows)


def _build_memory_table(costs: Costs) -> Table:
    rows = [
        (
            f"a fusion of {count}, in a fresh process",
            f"{costs.resident[count] / 2**20:.0f}",
            f"{private / 2**20:.0f}",
        )
        for count, private in costs.private.items()
    ]
    rows.append(("the coordinator's worker, to its end", f"{costs.peak / 2**20:.0f}", ""))
    return Table(
        "Largest memory, MiB", ("process", "resident", "without pages of mapped files"), rows
    )


def _build_contributors_table(options: TwentyOptions, result: Mapping[str, Any]) -> Table:
    fusion = result["grown"]["fusion"]
    losses, router = fusion["losses"], find_router(fusion)
    rows = []
    for domain in (*options.domains, options.newcomer):
        member = result["contributors"][domain]
        rows.append(
            (
                domain,
                f"{losses['base'][domain]:.3f}",
                f"{losses['specialists'][domain][domain]:.3f}",
                f"{losses['fused'][router][domain]:.3f}",
                f"{100.0 * (1 - member['loss'] / member['base_loss']):.1f} %",
                f"{member['bytes']['adapter'] / 1000:.0f}",
                f"{member['bytes']['samples'] / 1000:.0f}",
                f"{member['seconds']['received_bytes'] / 1000:.0f}",
                f"{sum(member['seconds']['processor'].values()):.0f}",
            )
        )
    return Table(
        "Contributors",
        ("domain", "base, nats", "own specialist", "fused (with the newcomer)", "divergence",
         "adapter, kB", "samples, kB", "received, kB", "seconds"),
        rows,
    )  # fmt: skip
