"""The demo at three seeds with its controls, kept under docs/results/demo with a summary.

    python bench/demo_seeds.py                 # runs `molora demo` once a seed, half an hour each
    python bench/demo_seeds.py --from FOLDER   # collects runs FOLDER/seed-42, ... made before

Kept are report.json of every seed, and page and figures of the first. The bars are those of the
main job: the published router at least 5 % below min(base, best specialist), the upper end of its
gap to the domain oracle at most +0.005 nats, contamination by anyone's train text at most 2 % in
every domain once the blocks above the limit are left out. And those of its figures: what the
guarantee costs, what any document costs above its best expert, and the headline forecasts inside
their intervals.
"""

import argparse
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

SEEDS = (42, 137, 2026)
FITTED = "evidence"  # the published router without its guarantee
LARGEST_COST = 0.002  # nats
CONTROLS = {
    "monolithic": "one adapter of the linear layers",
    "base_continued": "all parameters of the base",
}
OUT = Path("docs/results/demo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, help="folder of runs made before")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="some of them only")
    arguments = parser.parse_args()
    source = arguments.source or Path("demo-seeds")
    results = {}
    for seed in arguments.seeds:
        run = source / f"seed-{seed}"
        if arguments.source is None:
            command = ["molora", "demo", "--seed", str(seed), "--privacy", "pooled", "--control"]
            command += ["--out", str(run)]
            subprocess.run(command, check=True)
        results[seed] = keep(run / "report", OUT / f"seed-{seed}", whole=seed == SEEDS[0])
        rates = {name: run / "cooperative" / "control" / name / "rates.json" for name in CONTROLS}
        results[seed]["rates"] = {
            name: json.loads(path.read_text(encoding="utf-8")) for name, path in rates.items()
        }
    (OUT / "README.md").write_text(summarize(results), encoding="utf-8")
    print((OUT / "README.md").read_text(encoding="utf-8"))


def keep(report: Path, target: Path, *, whole: bool) -> dict[str, Any]:
    target.mkdir(parents=True, exist_ok=True)
    patterns = ("report.json", "report.html", "*.png") if whole else ("report.json",)
    for pattern in patterns:
        for file in report.glob(pattern):
            if file.suffix == ".png":
                shutil.copyfile(file, target / file.name)
                continue
            # Where it was run is nobody's business.
            text = file.read_text(encoding="utf-8")
            place = str(report.parent.absolute())
            (target / file.name).write_text(text.replace(place, report.parent.name), "utf-8")
    result: dict[str, Any] = json.loads((report / "report.json").read_text(encoding="utf-8"))
    return result


def summarize(results: dict[int, dict[str, Any]]) -> str:
    lines = [
        f"# The demo at {len(results)} seed{'s' if len(results) > 1 else ''}",
        "",
        "`python bench/demo_seeds.py`, which runs",
        "`molora demo --seed SEED --privacy pooled --control` and keeps the report of each. The",
        "seed decides base, data order, routers and bootstraps; documents are split alike at every",
        "seed, by the charter's split seed. Losses are held-out nats per",
        "token, equal weight over domains; intervals are the 95 % bootstrap by document cluster.",
        "The unit of replication is the seed (everything trained anew) for what is said of all",
        "three, and the document cluster inside a seed.",
        "",
    ]
    lines += tabulate(
        ["seed", "base", "best specialist", "linear", "evidence-zero", "evidence", "published",
         "gain on best alone", "gap to domain oracle, nats"],
        [list_losses(seed, result) for seed, result in results.items()],
    )  # fmt: skip
    lines += [
        "",
        "## Against pooling everybody's text",
        "",
        "Both controls train on all domains' text pooled, for the steps of all specialists",
        "together, at every learning rate named; the one best on validation text is shown. The",
        "fused model runs all its experts for every token, a control is one model.",
        "",
    ]
    lines += tabulate(
        ["seed", "what is trained on pooled text", "rates tried, validation loss", "rate", "loss",
         "fused minus this, nats", "percent", "better"],
        [row for seed, result in results.items() for row in list_controls(seed, result)],
    )  # fmt: skip
    lines += [
        "",
        "## What the guarantee costs, and what it holds",
        "",
        "The published router weighs `evidence` and `evidence-zero` (docs/routers.md). Its cost",
        "is its loss less that of `evidence` alone; the excess is how much a part of a held-out",
        "document costs above its best expert, summed over its tokens.",
        "",
    ]
    lines += tabulate(
        ["seed", "router", "cost, nats per token", "largest excess, nats", "promised",
         "parts of documents", "largest excess of `evidence`"],
        [list_guarantee(seed, result) for seed, result in results.items()],
    )  # fmt: skip
    lines += ["", "## Bars", ""]
    lines += tabulate(
        ["bar", *map(str, results)],
        [
            [name, *("met" if check(result) else "missed" for result in results.values())]
            for name, check in BARS.items()
        ],
    )
    lines += [
        "",
        "## Forecasts, recorded before the outcome",
        "",
        "The headline, in bold, comes from the full matrix of losses; the laws below it know",
        "less.",
        "",
    ]
    lines += tabulate(
        ["seed", "predictor", "reference", "forecast", "interval", "level", "outcome", "inside"],
        [row for seed, result in results.items() for row in list_forecasts(seed, result)],
    )
    lines += ["", "## Contamination, measured over everybody's train text and the base's", ""]
    lines += tabulate(
        ["seed", "domain", "own train text", "everybody's", "blocks left out", "afterwards"],
        [row for seed, result in results.items() for row in list_overlaps(seed, result)],
    )
    lines += ["", "## Compute", ""]
    lines += tabulate(
        ["seed", "base steps, tokens", "specialists' steps", "steps of each control"],
        [list_compute(seed, result) for seed, result in results.items()],
    )
    return "\n".join([*lines, ""])


def tabulate(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def list_losses(seed: int, result: dict[str, Any]) -> list[str]:
    weights = {name: value["point"] for name, value in result["equal_weight"].items()}
    router = result["router"]
    gain = result["gain_percent"][router]["vs_best_alone"]
    interval = result["gain_interval_percent"][router]["vs_best_alone"]
    gap = result["oracle_gap_nats"][router]
    routers = [weights[f"fused:{name}"] for name in ("linear", "evidence-zero", FITTED, router)]
    losses = [weights["base"], result["best_specialist"]["loss"], *routers]
    return [
        str(seed),
        *(f"{loss:.4f}" for loss in losses),
        f"{gain:+.2f} % [{interval['low']:+.2f}, {interval['high']:+.2f}]",
        f"{gap['point']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]",
    ]


def list_controls(seed: int, result: dict[str, Any]) -> list[list[str]]:
    fused = result["equal_weight"][f"fused:{result['router']}"]["point"]
    rows = []
    for name, trained in CONTROLS.items():
        loss = result["equal_weight"][name]["point"]
        nats, rates = result["control_difference_nats"][name], result["rates"][name]
        tried = ", ".join(f"{r}: {found:.3f}" for r, found in rates["validation_loss"].items())
        better = "fusing" if nats["high"] < 0 else "pooling" if nats["low"] > 0 else "neither"
        rows.append(
            [
                str(seed),
                trained,
                tried,
                f"{rates['chosen']:g}",
                f"{loss:.4f}",
                f"{nats['point']:+.4f} [{nats['low']:+.4f}, {nats['high']:+.4f}]",
                f"{100 * (loss - fused) / loss:+.2f} %",
                better,
            ]
        )
    return rows


def measure_cost(result: dict[str, Any]) -> float:
    """Loss of the published router less that of its fitted form, nats per token."""
    weights = result["equal_weight"]
    published, fitted = (weights[f"fused:{name}"]["point"] for name in (result["router"], FITTED))
    return float(published - fitted)


def list_guarantee(seed: int, result: dict[str, Any]) -> list[str]:
    router, excess = result["router"], result["excess_nats"]
    return [
        str(seed),
        router,
        f"{measure_cost(result):+.4f}",
        f"{excess[router]['largest']:.3f}",
        f"{excess[router]['bound']:.3f}",
        f"{excess[router]['parts']:,}",
        f"{excess[FITTED]['largest']:.3f}",
    ]


def list_forecasts(seed: int, result: dict[str, Any]) -> list[list[str]]:
    first = result["headline"]["predictors"]
    rows = []
    for name in (*first, *sorted(result["forecasts"].keys() - set(first))):
        forecast = result["forecasts"][name]
        point = "-" if forecast["point"] is None else f"{forecast['point']:+.2f}"
        rows.append(
            [
                str(seed),
                f"**{name}**" if name in first else name,
                forecast["reference"].replace("_", " "),
                point,
                f"{forecast['low']:+.2f} to {forecast['high']:+.2f}",
                f"{100 * forecast['level']:.0f} %",
                f"{forecast['actual']:+.2f}",
                "yes" if forecast["inside"] else "no",
            ]
        )
    return rows


def list_compute(seed: int, result: dict[str, Any]) -> list[str]:
    compute = result["compute"]
    steps = sum(one["steps"] for one in compute["contributors"].values())
    base = compute["base"]
    controls = ", ".join(f"{one['steps']:,}" for one in compute["controls"].values())
    return [str(seed), f"{base['steps']:,}, {base['tokens']:,}", f"{steps:,}", controls]


def list_overlaps(seed: int, result: dict[str, Any]) -> list[list[str]]:
    return [
        [
            str(seed),
            domain,
            f"{100 * result['contamination'][domain]:.2f} %",
            f"{100 * row['union']:.2f} %",
            f"{row['left_out']} of {row['blocks']}",
            f"{100 * row['after']:.2f} %",
        ]
        for domain, row in result["overlap"]["domains"].items()
    ]


def has_headline_inside(result: dict[str, Any]) -> bool:
    chosen = result["headline"]["predictors"]
    return len(chosen) == 2 and all(result["forecasts"][name]["inside"] for name in chosen)


BARS = {
    "published router at least 5 % below min(base, best specialist)": lambda result: (
        result["gain_percent"][result["router"]]["vs_best_alone"] >= 5
    ),
    "upper end of its gap to the domain oracle at most +0.005 nats": lambda result: (
        result["oracle_gap_nats"][result["router"]]["high"] <= 0.005
    ),
    "contamination by anyone's train text at most 2 % in every domain": lambda result: (
        max(row["after"] for row in result["overlap"]["domains"].values()) <= 0.02
    ),
    "the guarantee costs at most 0.002 nats": lambda result: measure_cost(result) <= LARGEST_COST,
    "no document costs more than is promised": lambda result: (
        result["excess_nats"][result["router"]]["largest"]
        <= result["excess_nats"][result["router"]]["bound"]
    ),
    "both headline forecasts inside their intervals": has_headline_inside,
}

if __name__ == "__main__":
    main()
