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
from molora_studies.verdicts import Span, join_verdicts, judge_above, name_unit

__all__ = ["SharedInitOptions", "SharedInitStudy", "rebase_adapter"]


class SharedInitOptions(StudyOptions):
    """Options.

    Attributes:
        domains: One contributor each, in the order of the ages.
        ages: Steps each contributor's checkpoint was trained beyond the shared base, by label.
            Different ones are also compared with a matched start at their middle age.
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

    Each set of ages is compared with contributors who all start at its middle age. Only a balanced
    set, whose mean is its middle, has seen as much text as that: verdicts rest on such pairs. Of
    ages 0, 2600 and 7800 the checkpoints have a third more text than three of 2600.
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
        on_specialist = {
            n: read(n, lambda r: read_gain(r, "linear", "best_specialist")) for n in labels
        }
        specialist = {n: estimate(values) for n, values in on_specialist.items()}
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
        misled = {
            n: _subtract(on_specialist[n], on_specialist[_name_middle(starts[n])]) for n in mixed
        }
        judged = [n for n in mixed if _is_balanced(starts[n])]
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
            claims=_list_claims(options, judged, cost, rise, misled),
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
            notes=[
                "Checkpoints are one line of continued trainings of one base, the same at all "
                "seeds, and so are the held-out documents: a seed is another training of the "
                "specialists and another fit of the router.",
                "Verdicts rest on sets of ages whose mean is their middle age "
                f"({', '.join(judged) or 'none here'}): others differ from their matched start in "
                "how much text the checkpoints have read, too.",
            ],
        )  # fmt: skip


def _list_claims(
    options: SharedInitOptions,
    judged: Sequence[str],
    cost: Mapping[str, Estimate],
    rise: Mapping[str, Estimate],
    misled: Mapping[str, Estimate],
) -> list[Claim]:
    """The paper's claims, each a difference from the matched start at the middle age.

    Args:
        options: The study's options.
        judged: Labels of balanced sets of ages.
        cost: Difference in fused loss, nats.
        rise: Difference in cross-routing, percentage points.
        misled: Difference in the gain on the best specialist, percentage points.
    """
    unit = name_unit("training seed of the specialists", len(options.seeds))

    def claim(
        text: str, published: str, found: Mapping[str, Estimate], shown: tuple[str, int], why: str
    ) -> Claim:
        verdicts = [judge_above([Span.of(found[label])]) for label in judged]
        return Claim(
            text,
            published,
            "; ".join(f"{n}: {e.show(*shown)}" for n, e in found.items()),
            join_verdicts(verdicts) if verdicts else "not decided",
            unit,
            f"{why}, minus that of contributors who all start at the middle age, paired by seed; "
            f"verdict on {', '.join(judged) or 'no set'}, where both have read equally much",
        )

    return [
        claim(
            "Different starting checkpoints cost fused loss",
            "+10.4 % on the base matched, +9.5 and +9.4 % mismatched",
            cost,
            ("nats", 4),
            "fused loss of the linear router",
        ),
        claim(
            "Different starts make the router mix up domains",
            "11 % cross-routing at 5k/10k/20k",
            rise,
            ("pp", 2),
            "share of gates on other domains' specialists under the causal linear router",
        ),
        claim(
            "The gain on the best specialist misleads: it rises as starts drift apart",
            "it rises where the gain on the base falls",
            misled,
            ("pp", 2),
            "gain of the linear router on the best specialist",
        ),
    ]


def list_starts(options: SharedInitOptions) -> dict[str, tuple[int, ...]]:
    """Ages by label from the closest together to the widest apart, then their matched starts."""
    starts = {
        label: tuple(ages)
        for label, ages in sorted(options.ages.items(), key=lambda item: _spread(item[1]))
    }
    for ages in list(starts.values()):
        if len(set(ages)) > 1:
            middle = sorted(ages)[len(ages) // 2]
            starts[_name_middle(ages)] = (middle,) * len(ages)
    return starts


def _spread(ages: Sequence[int]) -> int:
    return max(ages) - min(ages)


def _is_balanced(ages: Sequence[int]) -> bool:
    """Whether contributors of these ages have read as much as if all had the middle age."""
    return sum(ages) == len(ages) * sorted(ages)[len(ages) // 2]


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
