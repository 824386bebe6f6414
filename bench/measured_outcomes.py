"""What our own fusions gained, out of kept results: the evidence that headline forecasts rest on.

    python bench/measured_outcomes.py            # writes plugins/molora_kalavai/measured.json
    python bench/measured_outcomes.py --check    # fails if the shipped file is another

Every run of the studies below that has a calibration loss matrix and a gain of the evidence router
is taken, none is chosen. Conditions that share a trained specialist (the same task: base, domain,
recipe, seed) are no independent evidence, nor are those that share one with a third, and so on: a
group is all of them. Runs of one condition at several seeds are one group, too. The demo's own
outcomes are no part of it: forecasts are judged on them.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora_studies.framework.contract import Cell
from molora_studies.framework.registry import get_studies
from molora_studies.framework.rejudge import plan_kept

RESULTS = Path("docs/results/kalavai")
OUT = Path("plugins/molora_kalavai/measured.json")
STUDIES = ("divergence-law", "scaling", "cross-lingual")
"""`divergence-law` holds conditions settled before any was forecast; the others add domains to its
largest group, and no group: intervals can only get wider by them."""
PILOTS = "pilot"
ROUTER = "evidence"
DIGITS = 6
NOTE = (
    "Our own fusions: cross-entropy in nats/token on calibration blocks, base[d] and "
    "specialists[s][d]; gains = measured gain of the evidence router on held-out blocks, percent; "
    "oracle = that of the domain oracle there. "
    "pilots: the same losses after a share of the steps, on the first calibration blocks. group = "
    "all conditions that share a trained specialist, directly or through others: leave one group "
    "out, never one condition."
)


@dataclass
class _Run:
    """A run with what it was trained from: task keys of its specialists."""

    study: str
    condition: str
    seed: int
    trained: frozenset[str]
    result: Mapping[str, Any]
    group: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    arguments = parser.parse_args()
    text = render(collect_runs(RESULTS))
    if not arguments.check:
        OUT.write_text(text, encoding="utf-8")
    elif OUT.read_text(encoding="utf-8") != text:
        sys.exit(f"{OUT} is not what {Path(__file__).name} makes of {RESULTS}. Run it again.")


def collect_runs(folder: Path) -> list[dict[str, Any]]:
    """Runs in the form of measured.json, in the order of studies and their cells."""
    runs: dict[str, _Run] = {}
    for study in STUDIES:
        for key, run in _read(folder, study):
            runs.setdefault(key, run)  # equal tasks are one run, whoever planned them
    _group(list(runs.values()))
    pilots = _read_pilots(folder)
    return [_describe(run, pilots.get(key)) for key, run in runs.items()]


def _open(folder: Path, study: str) -> Iterator[tuple[Cell, Mapping[str, Any]]]:
    """Cells with their kept results; a plan that has changed since is refused."""
    kept = json.loads((folder / f"{study}.json").read_text(encoding="utf-8"))
    found = get_studies().registry.resolve(study)
    options = {**kept["options"], "seeds": kept["seeds"]}
    rows = {row["name"]: row for row in kept["cells"]}
    for cell in plan_kept(found, {**kept, "options": options}):
        row = rows[cell.name]
        if row["key"] != cell.task.key:
            sys.exit(f"{study}, {cell.name}: the kept result is of another task. Run the study.")
        yield cell, row["result"]


def _read(folder: Path, study: str) -> Iterator[tuple[str, _Run]]:
    for cell, result in _open(folder, study):
        if "calibration" not in result or ROUTER not in result["gains"]:
            continue
        trained = frozenset(t.key for t in cell.task.walk() if t.action == "train-domain")
        # One condition of the first study is often another's, too: its names are the shorter.
        name = cell.labels.get("condition") or f"{study}, {cell.name.rsplit(' seed ', 1)[0]}"
        yield cell.task.key, _Run(study, name, int(cell.labels["seed"]), trained, result)


def _read_pilots(folder: Path) -> dict[str, dict[str, Any]]:
    """Pilots by the key of the fusion that they were pilots of."""
    pilots: dict[str, dict[str, Any]] = {}
    outcomes: dict[str, str] = {}
    for cell, result in _open(folder, PILOTS):
        name, kind = cell.name.rsplit(", ", 1)
        if kind == "outcome":
            outcomes[name] = cell.task.key
            steps = max(t.settings["steps"] for t in cell.task.walk() if t.action == "train-domain")
            pilots[name]["share"] = pilots[name].pop("steps") / steps
        else:
            pilots[name] = {**result["pilots"], "steps": result["steps"]}
    return {outcomes[name]: found for name, found in pilots.items()}


def _group(runs: list[_Run]) -> None:
    """Name each run's group: the first of its conditions, and how many others there are."""
    parent = list(range(len(runs)))

    def find(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    for i, first in enumerate(runs):
        for j, second in enumerate(runs[:i]):
            if first.condition == second.condition or first.trained & second.trained:
                low, high = sorted((find(i), find(j)))
                parent[high] = low
    for index in range(len(runs)):
        members = [run for other, run in enumerate(runs) if find(other) == find(index)]
        conditions = list(dict.fromkeys(run.condition for run in members))
        others = len(conditions) - 1
        runs[index].group = conditions[0] + (f" and {others} others" if others else "")


def _round(losses: Mapping[str, float], domains: list[str]) -> list[float]:
    return [round(losses[domain], DIGITS) for domain in domains]


def _describe(run: _Run, pilots: Mapping[str, Any] | None) -> dict[str, Any]:
    matrix = run.result["calibration"]
    oracle = run.result["evaluation"]["baseline_gain_percent"]["domain_oracle"]
    domains, names = matrix["domains"], list(matrix["specialists"])
    row: dict[str, Any] = {
        "condition": f"{run.condition}, seed {run.seed}",
        "study": run.study,
        "group": run.group,
        "seed": run.seed,
        "domains": domains,
        "own_domain": [matrix["own_domain"][name] for name in names],
        "base": _round(matrix["base"], domains),
        "specialists": [_round(matrix["specialists"][name], domains) for name in names],
        "gains": {k: round(v, DIGITS) for k, v in run.result["gains"][ROUTER].items()},
        "oracle": {
            name.removeprefix("vs_"): round(value["point"], DIGITS)
            for name, value in oracle.items()
        },
    }
    if pilots is not None:
        if pilots["domains"] != domains or list(pilots["specialists"]) != names:
            sys.exit(f"{row['condition']}: its pilots are of other domains. Run the study.")
        row["pilots"] = {
            "share": round(pilots["share"], DIGITS),
            "base": _round(pilots["base"], domains),
            "specialists": [_round(pilots["specialists"][name], domains) for name in names],
        }
    return row


def render(runs: list[dict[str, Any]]) -> str:
    """The file's text: a run a line."""
    head = {"note": NOTE, "source": f"docs/results/kalavai/{{{','.join((*STUDIES, PILOTS))}}}.json"}
    lines = ",\n".join(json.dumps(run) for run in runs)
    return json.dumps(head, indent=0)[:-2] + ',\n"runs": [\n' + lines + "\n]\n}\n"


if __name__ == "__main__":
    main()
