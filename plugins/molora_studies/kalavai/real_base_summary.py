"""What study `real-base` says: claims on the published figures, tables, a picture."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from molora_fed.charter import FusionRules
from molora_fed.forecasting.headline import choose_headline
from molora_fed.forecasting.pilots import PUBLISHED_GROWTH, extrapolate
from molora_fed.forecasting.records import ask_predictors
from molora_fed.plugins import get_plugins
from molora_fed.types import Case
from molora_studies.framework.contract import Claim, Figure, Summary, Table, Verdict
from molora_studies.kalavai.comparisons import Replicated, show_interval
from molora_studies.kalavai.forecast_conditions import parse_matrix
from molora_studies.kalavai.merge_tuning import claim_merges, tabulate_merges
from molora_studies.kalavai.method_table import (
    draw_gains,
    list_rows,
    read_gain_interval,
    tabulate,
)
from molora_studies.verdicts import judge_above, judge_below

__all__ = ["PAIRS", "ROUTER", "summarise_real_base"]

ROUTER = "evidence-mixed"
"""The default router, on whose figures the claims are."""

ORACLE_NATS = 0.005
"""The domain oracle counts as reached if the loss is at most this far above it, nats."""

_RIVALS = ("pooled_lora", "base_continued", "weight_average")
PAIRS: Sequence[tuple[str, str]] = (
    *((f"fused:{ROUTER}", rival) for rival in _RIVALS),
    (f"fused:{ROUTER}", "fused:linear"),
    (f"fused:{ROUTER}", "fused:evidence"),
)
"""Methods whose differences are reported."""

_GROUP = "real-base"
_PUBLISHED_GAIN = 7.72  # arXiv 2603.22755, Pythia-410M, percent on the best specialist

Results = Mapping[str, Mapping[str, Any]]


def summarise_real_base(options: Any, results: Results) -> Summary:
    """Claims, tables and pictures.

    Args:
        options: `RealBaseOptions`.
        results: Results by cell.
    """
    runs = [results[f"lora seed {seed}"] for seed in options.seeds]
    tuned = [results[f"tuned merges seed {seed}"] for seed in options.seeds]
    rows = list_rows(results["mean"])
    forecasts = [line for seed in options.seeds for line in _forecast(options, results, seed)]
    rates = _read_rates(options, results)
    svd = results[f"svd seed {options.seeds[0]}"]
    count = len(options.seeds)
    return Summary(
        findings={
            "losses_nats": {row.name: dict(row.loss) for row in rows},
            "gain_percent": {
                row.name: {"best_alone": row.alone, "best_specialist": row.specialist}
                for row in rows
                if row.alone
            },
            "oracle_gap_nats": {
                label: [run["evaluation"]["oracle_gap_nats"][label] for run in runs]
                for label in runs[0]["evaluation"]["oracle_gap_nats"]
            },
            "differences_nats": results["differences"]["differences"],
            "forecasts": forecasts,
            "rates": rates,
            "bytes": _count_bytes(runs[0]),
            "svd": _describe_svd(svd),
            "tuned_merges": [each["merges"] for each in tuned],
        },
        claims=[*_claim(results, runs, rates, forecasts), *claim_merges(tuned)],
        tables=[
            tabulate(
                f"Every router and rival, mean of {count} trainings, 95 % intervals by document "
                "cluster",
                rows,
                {"passes a token": _count_passes(options, rows)},
            ),
            _tabulate_domains(options, runs),
            _tabulate_forecasts(forecasts),
            tabulate_merges(tuned),
            _tabulate_rates(options, rates),
            _tabulate_kinds(runs[0], svd, options.seeds[0]),
        ],
        figures=[
            Figure(
                "gains",
                "Gain of every method on the best anyone has alone, the mean of "
                f"{count} trainings; bars are 95 % intervals by document cluster.",
                lambda figure: draw_gains(figure, rows),
            ),
            Figure(
                "domains",
                "Loss by domain: the base, each domain's own specialist, the fused model, and "
                f"the base continued on everybody's text; mean of {count} trainings.",
                lambda figure: _draw_domains(figure, options, runs),
            ),
        ],
        notes=_describe(options),
    )


def _claim(
    results: Results,
    runs: Sequence[Mapping[str, Any]],
    rates: Sequence[Mapping[str, Any]],
    forecasts: Sequence[Mapping[str, Any]],
) -> list[Claim]:
    evaluations = [run["evaluation"] for run in runs]
    differences = {
        rival: Replicated.of_difference(
            results["differences"]["differences"][f"fused:{ROUTER} - {rival}"]
        )
        for rival in _RIVALS
    }
    gain = _read_gain(evaluations, f"fused:{ROUTER}", "best_specialist")
    alone = _read_gain(evaluations, f"fused:{ROUTER}", "best_alone")
    average = _read_gain(evaluations, "weight_average", "best_specialist")
    gap = Replicated.of_seeds([each["oracle_gap_nats"][ROUTER] for each in evaluations])
    return [
        Claim(
            "The fused model is better than the best specialist",
            f"+{_PUBLISHED_GAIN} % at 410M",
            gain.show("%"),
            _judge_size(gain, _PUBLISHED_GAIN),
            gain.unit,
            "differs if all intervals lie above 0 and one does not hold the published size; "
            "another base, other text and fewer steps",
        ),
        Claim(
            "The fused model is better than the best anyone has alone, the base included",
            "ours",
            alone.show("%"),
            judge_above(alone.spans),
            alone.unit,
            "by the sign of all intervals",
        ),
        Claim(
            f"The fused model is at most {ORACLE_NATS} nats above the domain oracle",
            "3e-6 nats above, by a router that sees the whole sequence",
            gap.show("nats", 4),
            judge_below(gap.spans, ORACLE_NATS),
            gap.unit,
            "holds if the upper end of every interval lies below",
        ),
        Claim(
            "The fused model is better than one LoRA adapter trained on everybody's text",
            "ours",
            differences["pooled_lora"].show("nats", 4),
            *_judge_rival(differences["pooled_lora"], rates, "pooled_lora"),
        ),
        Claim(
            "The fused model is better than the base continued with all its parameters on "
            "everybody's text",
            "+7.72 % beside +7.28 % of monolithic training",
            differences["base_continued"].show("nats", 4),
            *_judge_rival(differences["base_continued"], rates, "base_continued"),
        ),
        Claim(
            "Averaging weights loses against the best specialist",
            "-3.4 %",
            average.show("%"),
            judge_below(average.spans),
            average.unit,
            "by the sign of all intervals",
        ),
        _claim_forecasts(forecasts),
    ]


def _judge_rival(
    difference: Replicated, rates: Sequence[Mapping[str, Any]], recipe: str
) -> tuple[Verdict, str, str]:
    """Verdict, unit and reason of a claim against a rival; none is judged with a worse rate."""
    tried = [line for line in rates if line["recipe"] == recipe]
    best = min(tried, key=lambda line: fmean(line["losses"].values()))
    steps = "as many steps as all specialists together"
    if not best["is_chosen"]:
        reason = f"{steps}, at another rate than {best['rate']:g}, the best of {len(tried)}"
        return "not tuned", difference.unit, reason
    reason = f"{steps}, at the best of {len(tried)} rates by validation loss"
    return judge_below(difference.spans), difference.unit, f"{reason}; by the sign of all intervals"


def _judge_size(figure: Replicated, published: float) -> Verdict:
    verdict = judge_above(figure.spans)
    if verdict != "holds":
        return verdict
    inside = [
        span.low is not None and span.high is not None and span.low <= published <= span.high
        for span in figure.spans
    ]
    return "holds" if all(inside) else "differs"


def _read_gain(evaluations: Sequence[Mapping[str, Any]], method: str, reference: str) -> Replicated:
    return Replicated.of_seeds(
        [read_gain_interval(each, method, reference) for each in evaluations]
    )


def _claim_forecasts(forecasts: Sequence[Mapping[str, Any]]) -> Claim:
    """The headline's intervals; one condition says nothing of their level."""
    parts = []
    for stage in ("pilots", "before fusing"):
        lines = [line for line in forecasts if line["stage"] == stage and line["is_headline"]]
        given = [line for line in lines if line["low"] is not None]
        inside = sum(line["low"] <= line["outcome"] <= line["high"] for line in given)
        parts.append(f"{stage}: {inside} of {len(given)} intervals hold the outcome")
    return Claim(
        "Headline forecasts hold the outcome in 80 % of cases",
        "ours",
        "; ".join(parts),
        "not decided",
        "condition (1)",
        "runs of one condition count once, and one condition has no share",
    )


def _forecast(options: Any, results: Results, seed: int) -> list[dict[str, Any]]:
    """What every predictor said of a seed, from its pilots and before it was fused."""
    plugins, found = get_plugins(), []
    fused, pilots = results[f"lora seed {seed}"], results[f"pilots seed {seed}"]
    share = pilots["steps"] / options.steps
    cases = {
        "pilots": extrapolate(
            parse_matrix(pilots["pilots"]), share, PUBLISHED_GROWTH, group=_GROUP
        ),
        "before fusing": Case(parse_matrix(fused["calibration"]), _GROUP),
    }
    for stage, case in cases.items():
        said = ask_predictors(case, (), plugins)
        headline = choose_headline(FusionRules().headline, said, case, plugins)
        for name, forecast in said.items():
            if forecast is not None:
                found.append(
                    {
                        "seed": seed,
                        "stage": stage,
                        "predictor": name,
                        "is_headline": name in headline.predictors,
                        "reference": forecast.reference,
                        "point": forecast.point,
                        "low": forecast.low,
                        "high": forecast.high,
                        "outcome": fused["gains"][ROUTER][forecast.reference],
                    }
                )
    return found


def _tabulate_forecasts(forecasts: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    keys = dict.fromkeys((line["stage"], line["predictor"]) for line in forecasts)
    for stage, predictor in sorted(keys, key=lambda key: key[0] != "pilots"):
        lines = [f for f in forecasts if (f["stage"], f["predictor"]) == (stage, predictor)]
        with_ends = [line for line in lines if line["low"] is not None]
        inside = sum(line["low"] <= line["outcome"] <= line["high"] for line in with_ends)
        rows.append(
            (
                stage,
                predictor + (" (headline)" if lines[0]["is_headline"] else ""),
                lines[0]["reference"].replace("_", " "),
                ", ".join(_show_forecast(line) for line in lines),
                ", ".join(f"{line['outcome']:+.2f}" for line in lines),
                f"{inside} of {len(with_ends)}" if with_ends else "",
            )
        )
    return Table(
        "Forecasts of the gain, percent, at each training; 80 % intervals",
        ("stage", "predictor", "against", "forecast", "came out", "inside"),
        rows,
    )


def _show_forecast(line: Mapping[str, Any]) -> str:
    point = "-" if line["point"] is None else f"{line['point']:+.2f}"
    return point if line["low"] is None else f"{point} [{line['low']:+.2f}, {line['high']:+.2f}]"


def _read_rates(options: Any, results: Results) -> list[dict[str, Any]]:
    """Validation losses of every rate tried, and the rate that every seed takes."""
    found = []
    for recipe in ("lora", "pooled_lora", "base_continued", "svd"):
        chosen = getattr(options, recipe)
        for rate in chosen.rates:
            losses = {
                name.removeprefix(f"{recipe} ").removesuffix(f" at {rate:g}"): result["loss"]
                for name, result in results.items()
                if name.startswith(f"{recipe} ") and name.endswith(f" at {rate:g}")
            }
            found.append(
                {
                    "recipe": recipe,
                    "rate": rate,
                    "losses": losses,
                    "is_chosen": rate == chosen.rate,
                }
            )
    return found


def _tabulate_rates(options: Any, rates: Sequence[Mapping[str, Any]]) -> Table:
    return Table(
        f"Learning rates by validation loss at seed {options.seeds[0]}, nats; the rate in use is "
        "marked",
        ("trained", "rate", "loss"),
        [
            (
                line["recipe"],
                f"{line['rate']:g}" + (" (in use)" if line["is_chosen"] else ""),
                ", ".join(f"{on} {loss:.4f}" for on, loss in line["losses"].items()),
            )
            for line in rates
        ],
    )


def _mean_losses(runs: Sequence[Mapping[str, Any]], method: str, domain: str) -> float:
    """Mean over trainings of a method's held-out loss in a domain; "own" is its specialist."""
    values = []
    for run in runs:
        losses = run["held_out"]
        if method == "own":
            values.append(
                next(
                    losses["specialists"][name][domain]
                    for name, own in losses["own_domain"].items()
                    if own == domain
                )
            )
        elif method == "base":
            values.append(losses["base"][domain])
        elif method in losses["fused"]:
            values.append(losses["fused"][method][domain])
        else:
            values.append(run["evaluation"]["losses"][method][domain])
    return fmean(values)


_SHOWN = ("base", "own", ROUTER, "pooled_lora", "base_continued")


def _tabulate_domains(options: Any, runs: Sequence[Mapping[str, Any]]) -> Table:
    clusters = runs[0]["clusters"]
    return Table(
        f"Losses by domain, nats, mean of {len(runs)} trainings",
        ("domain", "base", "own specialist", f"fused, {ROUTER}", "one LoRA adapter, pooled text",
         "all parameters, pooled text"),
        [
            (
                f"{domain} ({'known' if domain in options.known else 'foreign'}"
                f", {clusters[domain]} clusters of held-out documents)",
                *(f"{_mean_losses(runs, method, domain):.3f}" for method in _SHOWN),
            )
            for domain in options.domains
        ],
    )  # fmt: skip


def _count_passes(options: Any, rows: Sequence[Any]) -> dict[str, str]:
    experts = len(options.domains) + 1
    return {
        row.name: str(experts) if row.kind == "router" and row.name != "dispatch" else "1"
        for row in rows
        if row.kind != "oracle"
    }


def _count_bytes(run: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(member["adapter_bytes"]) for name, member in run["members"].items()}


def _describe_svd(run: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "losses_nats": run["evaluation"]["equal_weight"],
        "gain_percent": {
            reference: read_gain_interval(run["evaluation"], f"fused:{ROUTER}", reference)
            for reference in ("best_alone", "best_specialist")
        },
        "bytes": _count_bytes(run),
    }


def _tabulate_kinds(lora: Mapping[str, Any], svd: Mapping[str, Any], seed: int) -> Table:
    rows = []
    for kind, run in (("lora", lora), ("svd", svd)):
        sizes = list(_count_bytes(run).values())
        gap = run["evaluation"]["oracle_gap_nats"][ROUTER]
        rows.append(
            (
                kind,
                f"{fmean(sizes) / 1e6:.2f} MB",
                show_interval(
                    run["evaluation"]["equal_weight"][f"fused:{ROUTER}"], "", digits=3, sign=False
                ),
                show_interval(
                    read_gain_interval(run["evaluation"], f"fused:{ROUTER}", "best_alone"), "%"
                ),
                show_interval(gap, "", digits=4),
            )
        )
    return Table(
        f"Kinds of adapter, of equal rank, at seed {seed}: one training, no verdict",
        ("kind", "a contributor sends", "loss, nats", "gain on the best alone",
         "above the domain oracle, nats"),
        rows,
    )  # fmt: skip


def _draw_domains(figure: Any, options: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    shown = ("base", "own", ROUTER, "base_continued")
    labels = ("base", "own specialist", "fused", "all parameters, pooled text")
    axes, width = figure.subplots(), 0.8 / len(shown)
    for number, (method, label) in enumerate(zip(shown, labels, strict=True)):
        axes.bar(
            [place + (number - 1.5) * width for place in range(len(options.domains))],
            [_mean_losses(runs, method, domain) for domain in options.domains],
            width,
            label=label,
        )
    axes.set_xticks(range(len(options.domains)), options.domains)
    axes.set_ylabel("held-out loss, nats per token")
    axes.legend()


def _describe(options: Any) -> list[str]:
    tokens = options.steps * options.batch * options.base.block_size
    return [
        f"Base: {options.base.source}, in {options.base.dtype}; the usual one is "
        "SmolLM2-135M-Instruct, dequantised from Q4_1, saved in bfloat16.",
        f"A specialist takes {options.steps} steps of {options.batch} blocks of "
        f"{options.base.block_size} tokens, {tokens:,} tokens; a rival "
        f"{tokens * len(options.domains):,}, as many as all specialists together.",
        "What the base has read of the domains nobody knows, so contamination is measured against "
        "the contributors' text only. `python` and `science` are of the Python installation, "
        "`man-...` the manual pages of the machine and of MANPATH.",
        f"The first {options.held_out} held-out blocks of each domain; the same at all seeds: a "
        "seed is another training of the specialists and rivals, and another fit of the routers.",
        "The domain oracle takes each domain's own specialist; the token oracle each token's best "
        "expert, which no router can know.",
        f"Pilots have {100 * options.pilot_share:.0f} % of the steps; their drops are extrapolated "
        f"with the published exponent, {PUBLISHED_GROWTH}.",
        "Rates were chosen on validation text at the first seed and kept; the specialists' on one "
        "known and one foreign domain.",
        "Every router but `dispatch` runs all experts for every token.",
    ]
