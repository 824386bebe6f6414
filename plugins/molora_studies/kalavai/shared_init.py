"""What it costs when contributors start from different checkpoints of the same base."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.kinds import DeltaKind
from molora_fed.charter import AdapterRules
from molora_fed.plugins import get_plugins
from molora_studies.framework.actions import open_base
from molora_studies.framework.contract import (
    Cell,
    Claim,
    Figure,
    Study,
    StudyOptions,
    Summary,
    Table,
    Task,
    TaskContext,
    Verdict,
)
from molora_studies.framework.substrate import (
    FusionSettings,
    Member,
    SpecialistSettings,
    plan_base,
    plan_continued_base,
    plan_corpus,
    plan_fusion,
    plan_specialist,
)
from molora_studies.kalavai.conditions import (
    ROUTERS,
    THREE_DOMAINS,
    Estimate,
    estimate,
    read_gain,
    read_gain_over_base,
)

__all__ = ["SharedInitOptions", "SharedInitStudy", "rebase_adapter"]


class SharedInitOptions(StudyOptions):
    """Options.

    Attributes:
        domains: One contributor each, in the order of the ages.
        ages: Steps each contributor's checkpoint was trained beyond the shared base, by label; the
            first is matched. Others are also compared with a matched start at their middle age.
        base_domains: Domains the checkpoints are trained on further.
        steps: Steps of a specialist.
    """

    domains: tuple[str, ...] = THREE_DOMAINS
    ages: Mapping[str, tuple[int, ...]] = {
        "matched": (0, 0, 0),
        "1 : 1.25 : 1.5": (0, 650, 1300),
        "1 : 2 : 4": (0, 2600, 7800),
    }
    base_domains: tuple[str, ...] = ("cpp", "python", "readme", "science")
    steps: int = 600


def rebase_adapter(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Write (own checkpoint + adapter) - shared base as an adapter of the shared base.

    It is what a full checkpoint comes to when it was trained from another checkpoint: the platform
    would refuse it, and this measures what it spares its users.
    """
    shared, own, trained = context.needs
    base, start = open_base(shared), open_base(own)
    adapter = load_adapter(trained.folder / "adapter", plugins=get_plugins(), name="own")
    rules = AdapterRules(kinds=("delta",), max_bytes=2**62)
    with applied(start.model, adapter) as model:
        DeltaKind().export(
            model, base.model, context.folder / "adapter", 1, rules, base_weights=base.weights
        )
    made = load_adapter(context.folder / "adapter", plugins=get_plugins(), name="rebased")
    return {**trained.result, "adapter_hash": made.hash, "adapter_bytes": made.num_bytes}


class SharedInitStudy(Study):
    """Checkpoints of three ages; full models are fused, as if the check were not there.

    Each set of ages is compared with contributors who all start at its middle age, so that both
    have seen about as much text.
    """

    Options: ClassVar[type[StudyOptions]] = SharedInitOptions
    title: ClassVar[str] = "Shared initialisation"
    measures: ClassVar[tuple[str, ...]] = ("molora_kalavai",)

    @classmethod
    def plan(cls, options: SharedInitOptions) -> Sequence[Cell]:
        """A cell a set of ages and seed."""
        bases = cls._plan_bases(options)
        return [
            Cell(
                f"{label} seed {seed}",
                {"ages": label, "seed": seed},
                cls._plan_fusion(options, label, ages, seed, bases),
            )
            for label, ages in list_starts(options).items()
            for seed in options.seeds
        ]

    @classmethod
    def _plan_bases(cls, options: SharedInitOptions) -> dict[int, Task]:
        """Each checkpoint goes on from the one before it."""
        bases = {0: plan_base()}
        corpora = [plan_corpus(bases[0], domain) for domain in options.base_domains]
        extra = sorted({age for ages in options.ages.values() for age in ages} - {0})
        last = 0
        for age in extra:
            bases[age] = plan_continued_base(bases[last], corpora, steps=age - last)
            last = age
        return bases

    @classmethod
    def _plan_fusion(
        cls,
        options: SharedInitOptions,
        label: str,
        ages: Sequence[int],
        seed: int,
        bases: Mapping[int, Task],
    ) -> Task:
        members = []
        recipe = SpecialistSettings(steps=options.steps, seed=seed)
        base = bases[ages[0]] if len(set(ages)) == 1 else bases[0]
        for domain, age in zip(options.domains, ages, strict=True):
            corpus = plan_corpus(bases[0], domain)
            trained = plan_specialist(bases[age], corpus, recipe)
            if bases[age] is not base:
                trained = Task(
                    f"{trained.name} from {age} steps later, on the shared base",
                    "rebase-adapter",
                    {},
                    needs=(base, bases[age], trained),
                    seconds=3,
                )
            members.append(Member(domain, trained, corpus))
        settings = FusionSettings(routers=ROUTERS, seed=seed)
        return plan_fusion(f"ages {label}, seed {seed}", base, members, settings)

    @classmethod
    def summarise(
        cls, options: SharedInitOptions, results: Mapping[str, Mapping[str, Any]]
    ) -> Summary:
        """Gains and cross-routing by ages, against the matched start."""
        starts = list_starts(options)
        labels = list(starts)

        def read(label: str, figure: Any) -> list[float]:
            return [figure(results[f"{label} seed {seed}"]) for seed in options.seeds]

        over_base = {n: read(n, lambda r: read_gain_over_base(r, "linear")) for n in labels}
        ours = {n: estimate(read(n, read_gain)) for n in labels}
        specialist = {
            n: estimate(read(n, lambda r: read_gain(r, "linear", "best_specialist")))
            for n in labels
        }
        crossed = {
            n: estimate(100 * v for v in read(n, lambda r: _cross_routing(r, options.domains)))
            for n in labels
        }
        losses = {n: read(n, _fused_loss) for n in labels}
        mixed = [n for n in labels if len(set(starts[n])) > 1]
        cost = {n: _subtract(losses[n], losses[_name_middle(starts[n])]) for n in mixed}
        rise = {
            n: estimate(
                a - b
                for a, b in zip(
                    read(n, lambda r: 100 * _cross_routing(r, options.domains)),
                    read(
                        _name_middle(starts[n]),
                        lambda r: 100 * _cross_routing(r, options.domains),
                    ),
                    strict=True,
                )
            )
            for n in mixed
        }
        worst = mixed[-1]
        return Summary(
            findings={
                "over_base_percent": {n: estimate(v).to_json() for n, v in over_base.items()},
                "gain_evidence_percent": {n: e.to_json() for n, e in ours.items()},
                "gain_over_best_specialist_percent": {
                    n: e.to_json() for n, e in specialist.items()
                },
                "cross_routing_percent": {n: e.to_json() for n, e in crossed.items()},
                "fused_loss_nats": {n: estimate(v).to_json() for n, v in losses.items()},
                "cost_nats": {n: e.to_json() for n, e in cost.items()},
            },
            claims=[
                Claim(
                    "Different starting checkpoints cost fused loss",
                    "+10.4 % on the base matched, +9.5 and +9.4 % mismatched",
                    "; ".join(f"{n}: {e.show('nats', 4)}" for n, e in cost.items()),
                    _judge(cost[worst]),
                    "fused loss of the linear router minus that of contributors who all start at "
                    "the middle age, paired by seed",
                ),
                Claim(
                    "Different starts make the router mix up domains",
                    "11 % cross-routing at 5k/10k/20k",
                    "; ".join(f"{n}: {e.show('pp')}" for n, e in rise.items()),
                    _judge(rise[worst]),
                    "share of gates on other domains' specialists under the causal linear router, "
                    "minus that of a matched start at the middle age",
                ),
                Claim(
                    "The gain on the best specialist misleads: it rises as starts drift apart",
                    "it rises where the gain on the base falls",
                    "; ".join(f"{n}: {specialist[n].show()}" for n in labels),
                    "holds" if specialist[worst].mean > specialist[labels[0]].mean
                    else "does not hold",
                    "holds if it is larger at the widest ages than matched",
                ),
            ],
            tables=[
                Table(
                    "Linear router by starting checkpoints",
                    ("ages", "fused loss", "against the middle age", "on its base",
                     "on the best specialist", "cross-routing", "evidence, on the best alone"),
                    [
                        (
                            n,
                            estimate(losses[n]).show("nats", 4, sign=False),
                            cost[n].show("nats", 4) if n in cost else "",
                            estimate(over_base[n]).show(),
                            specialist[n].show(),
                            crossed[n].show(sign=False),
                            ours[n].show(),
                        )
                        for n in labels
                    ],
                )
            ],
            figures=[
                Figure(
                    "ages",
                    "Fused loss of the linear router by starting checkpoints, matched and not; "
                    "bars are 95 % intervals over seeds.",
                    lambda figure: _draw(
                        figure, {n: estimate(v) for n, v in losses.items()}, mixed
                    ),
                )
            ],
        )  # fmt: skip


def list_starts(options: SharedInitOptions) -> dict[str, tuple[int, ...]]:
    """Ages by label: those of the options, then a matched start at each middle age."""
    starts = {label: tuple(ages) for label, ages in options.ages.items()}
    for ages in list(starts.values()):
        if len(set(ages)) > 1:
            middle = sorted(ages)[len(ages) // 2]
            starts[_name_middle(ages)] = (middle,) * len(ages)
    return starts


def _name_middle(ages: Sequence[int]) -> str:
    return f"all {sorted(ages)[len(ages) // 2]} steps later"


def _fused_loss(result: Mapping[str, Any]) -> float:
    """Equal-weight held-out loss under the linear router, nats."""
    losses = result["held_out"]["fused"]["linear"]
    return float(sum(losses.values()) / len(losses))


def _subtract(one: Sequence[float], other: Sequence[float]) -> Estimate:
    return estimate(a - b for a, b in zip(one, other, strict=True))


def _cross_routing(result: Mapping[str, Any], domains: Sequence[str]) -> float:
    """Mean gate on other domains' specialists, in [0, 1]."""
    gates = result["evaluation"]["gates"]["linear"]
    shares = [sum(gates[d][e] for e in domains if e != d) for d in domains]
    return float(sum(shares) / len(shares))


def _judge(cost: Estimate) -> Verdict:
    if cost.low is None or cost.high is None:
        return "not decided"
    if cost.low > 0:
        return "holds"
    return "does not hold" if cost.high < 0 else "not decided"


def _draw(figure: Any, losses: Mapping[str, Estimate], mixed: Sequence[str]) -> None:
    axes = figure.subplots()
    labels = list(losses)
    for label, chosen in (
        ("different starts", mixed),
        ("matched starts", [n for n in labels if n not in mixed]),
    ):
        found = [losses[n] for n in chosen]
        errors = [e.mean - e.low if e.low is not None else 0.0 for e in found]
        axes.errorbar(
            [e.mean for e in found], [labels.index(n) for n in chosen], xerr=errors, fmt="o",
            capsize=3, label=label,
        )  # fmt: skip
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("fused loss of the linear router, nats per token")
    axes.legend()
