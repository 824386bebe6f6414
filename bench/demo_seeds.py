"""The demo at three seeds with its control, kept under docs/results/demo with a summary.

    python bench/demo_seeds.py                 # runs `molora demo` once a seed, ten minutes each
    python bench/demo_seeds.py --from FOLDER   # collects runs FOLDER/seed-42, ... made before

Kept are report.json of every seed, and page and figures of the first. The bars are those of the
main job: fitted evidence at least 5 % below min(base, best specialist), the upper end of its gap
to the domain oracle at most +0.005 nats, contamination by anyone's train text at most 2 % in every
domain once the blocks above the limit are left out.
"""

import argparse
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

SEEDS = (42, 137, 2026)
ROUTER = "evidence"
OUT = Path("docs/results/demo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, help="folder of runs made before")
    arguments = parser.parse_args()
    source = arguments.source or Path("demo-seeds")
    results = {}
    for seed in SEEDS:
        run = source / f"seed-{seed}"
        if arguments.source is None:
            command = ["molora", "demo", "--seed", str(seed), "--control", "--out", str(run)]
            subprocess.run(command, check=True)
        results[seed] = keep(run / "report", OUT / f"seed-{seed}", whole=seed == SEEDS[0])
    (OUT / "README.md").write_text(summarize(results), encoding="utf-8")
    print((OUT / "README.md").read_text(encoding="utf-8"))


def keep(report: Path, target: Path, *, whole: bool) -> dict[str, Any]:
    target.mkdir(parents=True, exist_ok=True)
    patterns = ("report.json", "report.html", "*.png") if whole else ("report.json",)
    for pattern in patterns:
        for file in report.glob(pattern):
            shutil.copyfile(file, target / file.name)
    result: dict[str, Any] = json.loads((report / "report.json").read_text(encoding="utf-8"))
    return result


def summarize(results: dict[int, dict[str, Any]]) -> str:
    lines = [
        "# The demo at three seeds",
        "",
        "`python bench/demo_seeds.py`, which runs `molora demo --seed SEED --control` and keeps",
        "the report of each. The seed decides base, data order, routers and bootstraps; documents",
        "are split alike at every seed, by the charter's split seed. Losses are held-out nats per",
        "token, equal weight over domains; intervals are the 95 % bootstrap by document cluster.",
        "The control is an adapter of the linear layers, trained on all domains' text pooled for",
        "the steps of all specialists together; embedding, output head and norms stay the base's.",
        "",
        "| seed | base | best specialist | control | linear | evidence-zero | evidence "
        "| gain on best alone | gap to domain oracle, nats | gain on control |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for seed, result in results.items():
        weights = {name: value["point"] for name, value in result["equal_weight"].items()}
        fused = weights[f"fused:{ROUTER}"]
        gain = result["gain_percent"][ROUTER]["vs_best_alone"]
        interval = result["gain_interval_percent"][ROUTER]["vs_best_alone"]
        gap = result["oracle_gap_nats"][ROUTER]
        on_control = 100 * (weights["control"] - fused) / weights["control"]
        lines.append(
            f"| {seed} | {weights['base']:.4f} | {result['best_specialist']['loss']:.4f} "
            f"| {weights['control']:.4f} | {weights['fused:linear']:.4f} "
            f"| {weights['fused:evidence-zero']:.4f} | {fused:.4f} "
            f"| {gain:+.2f} % [{interval['low']:+.2f}, {interval['high']:+.2f}] "
            f"| {gap['point']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}] | {on_control:+.2f} % |"
        )
    lines += ["", "## Bars", "", "| bar | " + " | ".join(map(str, results)) + " |"]
    lines.append("|---" * (len(results) + 1) + "|")
    for name, check in BARS.items():
        verdicts = ("met" if check(result) else "missed" for result in results.values())
        lines.append(f"| {name} | " + " | ".join(verdicts) + " |")
    lines += ["", "## Forecasts, recorded before the outcome", ""]
    lines += ["| seed | predictor | reference | forecast | interval | level | outcome | inside |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for seed, result in results.items():
        for name, forecast in result["forecasts"].items():
            lines.append(describe_forecast(seed, name, forecast))
    lines += ["", "## Compute and contamination", ""]
    lines += ["| seed | base steps, tokens | specialists' steps | contamination by domain |"]
    lines += ["|---|---|---|---|"]
    for seed, result in results.items():
        shares = (
            f"{name} {100 * row['union']:.2f} %, {100 * row['after']:.2f} % without "
            f"{row['left_out']} blocks"
            for name, row in result["overlap"]["domains"].items()
        )
        compute = result["compute"]
        steps = sum(one["steps"] for one in compute["contributors"].values())
        base = compute["base"]
        lines.append(
            f"| {seed} | {base['steps']:,}, {base['tokens']:,} | {steps:,} | {'; '.join(shares)} |"
        )
    return "\n".join([*lines, ""])


def describe_forecast(seed: int, name: str, forecast: dict[str, Any]) -> str:
    point = "-" if forecast["point"] is None else f"{forecast['point']:+.2f}"
    inside = forecast["low"] <= forecast["actual"] <= forecast["high"]
    return (
        f"| {seed} | {name} | {forecast['reference']} | {point} "
        f"| {forecast['low']:+.2f} to {forecast['high']:+.2f} | {100 * forecast['level']:.0f} % "
        f"| {forecast['actual']:+.2f} | {'yes' if inside else 'no'} |"
    )


BARS = {
    "evidence at least 5 % below min(base, best specialist)": lambda result: (
        result["gain_percent"][ROUTER]["vs_best_alone"] >= 5
    ),
    "upper end of its gap to the domain oracle at most +0.005 nats": lambda result: (
        result["oracle_gap_nats"][ROUTER]["high"] <= 0.005
    ),
    "contamination by anyone's train text at most 2 % in every domain": lambda result: (
        max(row["after"] for row in result["overlap"]["domains"].values()) <= 0.02
    ),
}

if __name__ == "__main__":
    main()
