"""A cascade over endpoints that fail in every way: the run goes on, the trace says what happened.

`python bench/endpoint_faults.py --out docs/results/acar`

A real HTTP server on loopback (molora_fed.testing.serve_faults) times out, answers 500, malformed
JSON, nothing, 10 MB and more; each fault is a member of one cascade, beside one member that works.
The run is recorded, replayed, sealed and verified as any other.
"""

import argparse
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

from molora_fed.cascade.building import describe_run_environment
from molora_fed.cascade.config import EndpointSource
from molora_fed.cascade.contract import CascadeTask, open_judge
from molora_fed.cascade.endpoint import EndpointModel
from molora_fed.cascade.escalation import Lineup
from molora_fed.cascade.running import Cascade, CascadeSettings
from molora_fed.cascade.session import run_in_folder
from molora_fed.plugins import get_plugins
from molora_fed.storage.files import write_bytes, write_json
from molora_fed.storage.keys import build_public_pem, load_or_make_key
from molora_fed.testing.endpoints import FAULTS, serve_faults
from molora_fed.tracing.reading import read_records
from molora_fed.tracing.verifying import verify

LIMITS = {"timeout_seconds": 1.0, "deadline_seconds": 2.0, "retries": 1, "backoff_seconds": 0.05}
DOES = {
    "silent": "takes the question and never answers",
    "broken": "status 500",
    "denied": "status 401",
    "busy": "status 429 twice, then an answer",
    "malformed": "JSON that ends in the middle",
    "strange": "JSON of another form",
    "empty": "status 200 and nothing",
    "wordless": "an answer of spaces",
    "huge": "10 MB without saying so",
    "long": "a text of 40,000 characters",
    "packed": "10 MB compressed into 10 kB",
    "dripping": "a byte every 50 ms, for ever",
    "cut": "closes in the middle of its answer",
    "elsewhere": "redirects to another address",
    "good": "answers",
}


def run(num_tasks: int) -> dict[str, Any]:
    plugins = get_plugins()
    tasks = [
        CascadeTask(f"task-{n}", "faults", f"Say x. ({n})", "normalised-text", "x")
        for n in range(num_tasks)
    ]
    names = (*FAULTS, "good")
    with tempfile.TemporaryDirectory() as made, serve_faults() as server:
        folder = Path(made)
        key = load_or_make_key(folder / "key.pem")
        models = {}
        for name in names:
            source = EndpointSource(kind="endpoint", url=server.url, model=name, **LIMITS)
            models[name] = EndpointModel(name, source)
        cascade = Cascade(
            lineup=Lineup(None, names),
            models=models,
            policy=plugins.escalation_policies.resolve("sigma")(None),
            policy_name="sigma",
            judge=open_judge("majority", plugins),
            judge_name="majority",
            extractors={"normalised-text": plugins.extractors.resolve("normalised-text")},
            settings=CascadeSettings(max_new_tokens=8),
        )
        describe_run_environment()  # loads torch, whose modules are not what is measured
        tracemalloc.start()
        started = time.monotonic()
        result = run_in_folder(cascade, tasks, folder / "run", key=key, plugins=plugins)
        seconds = time.monotonic() - started
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        trace = folder / "run" / "trace"
        report = verify(trace, build_public_pem(key), result.root)
        bodies = [one.body for one in read_records(trace) if one.kind == "decision"]
    return {
        "limits": LIMITS,
        "tasks": num_tasks,
        "models": {name: _describe(bodies, name) for name in names},
        "answers": [[one["answer"], one["winner"], one["state"]] for one in bodies],
        "differences": list(result.replay.differences),
        "verifies": report.ok,
        "peak_python_bytes": peak,
        "seconds": {"run": round(seconds, 2)},
    }


def _describe(bodies: list[dict[str, Any]], name: str) -> dict[str, Any]:
    samples = [one for body in bodies for one in body["samples"] if one["model"] == name]
    return {
        "failures": [one["failure"] for one in samples],
        "attempts": [one["attempts"] for one in samples],
        "seconds": {"longest": round(max(one["seconds"] for one in samples), 2)},
    }


def _join(failures: list[str | None]) -> str:
    return "; ".join(dict.fromkeys(failure or "an answer" for failure in failures))


def render(result: dict[str, Any], versions: str) -> str:
    rows = [
        f"| {name} | {DOES[name]} | {_join(one['failures'])} | "
        f"{max(one['attempts'])} | {one['seconds']['longest']:.2f} |"
        for name, one in result["models"].items()
    ]
    limits = ", ".join(f"{name} {value:g}" for name, value in result["limits"].items())
    answers = {f"{answer} by {winner}, {state}" for answer, winner, state in result["answers"]}
    return "\n".join(
        [
            "# Endpoints that fail",
            "",
            "`python bench/endpoint_faults.py --out docs/results/acar`",
            "",
            f"One run of {result['tasks']} tasks; every fault is a member, all members are asked, "
            "the majority of",
            f"answers wins. Limits: {limits}. {versions}",
            "",
            "| member | what its endpoint does | what the trace says | tries | longest, s |",
            "|---|---|---|---:|---:|",
            *rows,
            "",
            f"- Every task was answered: {'; '.join(sorted(answers))}.",
            f"- The whole run took {result['seconds']['run']:.1f} s; nothing hung.",
            f"- Memory that Python held at most: {result['peak_python_bytes'] / 2**20:.1f} MiB, "
            "reading and sealing the trace included.",
            f"- Decisions that replay otherwise: {len(result['differences'])}. The sealed trace "
            f"verifies: {'yes' if result['verifies'] else 'NO'}.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=3)
    arguments = parser.parse_args()
    result = run(arguments.tasks)
    import httpx

    page = render(result, f"Python {sys.version.split()[0]}, httpx {httpx.__version__}.")
    write_json(arguments.out / "endpoint-faults.json", result)
    write_bytes(arguments.out / "endpoint-faults.md", page.encode())
    print(page)
    if result["differences"] or not result["verifies"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
