"""`molora api` under load: 64 streams at once, one alone beside it, and what its memory does.

    python bench/api_load.py --folder FOLDER --out docs/results/api_load.json

Phases against one server process, each with a warm-up that does not count: one stream at a time
(`serial`), 4 and 16 at once, `--streams` at once (`concurrent`), and one at a time again, so that a
machine that slows down is seen. A stream asks for `--tokens` tokens after one of a few prompts of
other lengths, sampled, and asks again when it is answered. A third of the streams ask for a single
specialist, the others for the fused model; serial streams in the same proportion.

- tokens per second: completion tokens, as the server's usage counts them, of requests that ended
  within the phase, over the phase's seconds.
- first token, seconds: from sending the request to its first event.
- memory: resident bytes of the server, sampled each half second; a line is fitted to those of the
  concurrent phase after its first third, where buffers and pools of threads still grow.

The server has one thread of torch; the load comes from this process, on another core.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from molora_fed.models.runtime import describe_environment
from molora_fed.storage.files import write_json

PROMPTS = (
    "def main(",
    "The results of this study show that",
    "#include <vector>\n\nstd::vector<int> sort(std::vector<int> values) {\n",
    "# Installation\n\nClone the repository and run the following commands to install all of the "
    "packages that are needed. Then open the settings and change the name of the project:\n\n",
)
WARM_UP_SECONDS = 3.0
LEVELS = (4, 16)
"""Streams at a time between one and all."""


@dataclass
class Phase:
    """What one phase of the load measured."""

    requests: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    is_measured: bool = False

    def describe(self, seconds: float) -> dict[str, Any]:
        """Figures for the report."""
        found: dict[str, Any] = {
            "seconds": round(seconds, 2),
            "requests": self.requests,
            "errors": len(self.errors),
            "error_examples": sorted(set(self.errors))[:5],
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens / seconds, 1),
        }
        for name, values in (("first_token", self.first), ("request", self.whole)):
            if values:
                found[f"{name}_seconds"] = {
                    "median": round(statistics.median(values), 4),
                    "p99": round(float(np.quantile(values, 0.99)), 4),
                }
        return found


async def ask(client: httpx.AsyncClient, body: dict[str, Any], phase: Phase) -> None:
    """One streaming request, counted if its phase is measured when it ends."""
    started, first, tokens, tail = time.monotonic(), None, 0, b""
    try:
        async with client.stream("POST", "/completions", json=body) as response:
            async for part in response.aiter_raw():
                first = first or time.monotonic() - started
                tail = (tail + part)[-2_000:]
        found = re.findall(rb'"completion_tokens":(\d+)', tail)
        if response.status_code != 200 or not found or not tail.endswith(b"data: [DONE]\n\n"):
            raise RuntimeError(f"status {response.status_code}: {tail[-200:]!r}")
        tokens = int(found[-1])
    except (httpx.HTTPError, RuntimeError) as error:
        phase.errors.append(f"{type(error).__name__}: {error}")
        return
    if phase.is_measured:
        phase.requests += 1
        phase.tokens += tokens
        phase.first.append(first or 0.0)
        phase.whole.append(time.monotonic() - started)


async def stream_on(
    client: httpx.AsyncClient, number: int, step: int, models: list[str], tokens: int, phase: Phase
) -> None:
    """Ask again and again."""
    while True:
        name = models[1 + number % (len(models) - 1)] if number % 3 == 2 else models[0]
        body = {
            "model": name,
            "prompt": PROMPTS[number % len(PROMPTS)],
            "max_tokens": tokens,
            "seed": number,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        await ask(client, body, phase)
        number += step


async def run_phase(
    address: str, process: psutil.Process, streams: int, seconds: float, tokens: int
) -> tuple[Phase, float]:
    """Load for so many seconds after a warm-up."""
    phase = Phase()
    limits = httpx.Limits(max_connections=streams + 1, max_keepalive_connections=streams + 1)
    async with httpx.AsyncClient(
        base_url=address, timeout=60, limits=limits, trust_env=False
    ) as client:
        listed = (await client.get("/models")).json()["data"]
        models = [one["id"] for one in listed]
        tasks = [
            asyncio.create_task(stream_on(client, number, streams, models, tokens, phase))
            for number in range(streams)
        ]
        await asyncio.sleep(WARM_UP_SECONDS)
        phase.is_measured, started = True, time.monotonic()
        while (past := time.monotonic() - started) < seconds:
            phase.memory.append((past, process.memory_info().rss))
            await asyncio.sleep(min(0.5, seconds - past))
        phase.is_measured, past = False, time.monotonic() - started
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return phase, past


def fit_memory(samples: list[tuple[float, int]]) -> dict[str, Any]:
    """Resident bytes as they went, and their slope over all but the first third."""
    seconds, sizes = np.array(samples[len(samples) // 3 :], dtype=float).T
    sizes /= 2**20
    (slope, _), covariance = np.polyfit(seconds, sizes, 1, cov=True)
    ends = [len(samples) * (tenth + 1) // 10 - 1 for tenth in range(10)]
    return {
        "mib_by_tenth": [round(samples[end][1] / 2**20, 1) for end in ends],
        "first_mib": round(samples[0][1] / 2**20, 1),
        "last_mib": round(samples[-1][1] / 2**20, 1),
        "slope_mib_per_minute": round(60 * float(slope), 3),
        "slope_standard_error": round(60 * float(covariance[0, 0]) ** 0.5, 3),
        "fitted_samples": len(seconds),
    }


def start_server(
    folder: Path, streams: int, experts: str | None
) -> tuple[subprocess.Popen[str], str]:
    """A server of its own process, and its address."""
    chosen = [] if experts is None else ["--experts", experts]
    process = subprocess.Popen(
        [
            sys.executable, "-m", "molora_cli.main", "api", str(folder), "--port", "0",
            "--threads", "1", "--texts", str(streams), *chosen,
        ],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    found = re.match(r"serving (\S+):", process.stdout.readline())
    if found is None:
        raise SystemExit(f"The server did not start: exit code {process.wait()}.")
    return process, found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="of a fused model")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the concurrent phase")
    parser.add_argument("--serial-seconds", type=float, default=15.0)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--experts", help="who goes on after a prompt; see `molora api`")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    server, address = start_server(options.folder, options.streams, options.experts)
    process = psutil.Process(server.pid)
    report: dict[str, Any] = {
        "streams": options.streams,
        "experts_per_text": options.experts,
        "tokens_of_an_answer": options.tokens,
        "environment": describe_environment("cpu"),
    }
    try:
        for name, streams, seconds in (
            ("serial", 1, options.serial_seconds),
            *((f"{level} at a time", level, options.serial_seconds) for level in LEVELS),
            ("concurrent", options.streams, options.seconds),
            ("serial_again", 1, options.serial_seconds),
        ):
            phase, past = asyncio.run(run_phase(address, process, streams, seconds, options.tokens))
            report[name] = {"streams": streams, **phase.describe(past)}
            if name == "concurrent":
                report["memory"] = fit_memory(phase.memory)
            print(name, json.dumps(report[name]), flush=True)
    finally:
        server.terminate()
        report["exit_code_after_sigterm"] = server.wait(60)
    serial = max(report[name]["tokens_per_second"] for name in ("serial", "serial_again"))
    report["times_serial"] = round(report["concurrent"]["tokens_per_second"] / serial, 2)
    print(json.dumps({key: report[key] for key in ("memory", "times_serial")}, indent=2))
    if options.out is not None:
        write_json(options.out, report)


if __name__ == "__main__":
    main()
