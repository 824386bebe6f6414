"""What the machine of a demo adds to the coordinator's result: it can see all sides."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from molora_fed.contributions.manifest import Contribution
from molora_fed.contributions.receive import load_admitted
from molora_fed.cooperative.cooperative import Cooperative
from molora_fed.corpus.blocks import Blocks, load_blocks
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.local import LocalContributor
from molora_fed.federation.sent import count_sent
from molora_fed.inference.fused_build import build_causal_lm
from molora_fed.inference.generate import Sampling, generate
from molora_fed.models.runtime import limit_threads
from molora_fed.reporting.methods import BUDGET_SECONDS
from molora_fed.reporting.report import MetricRows, read_metrics_file, write_report
from molora_fed.routing.bundle import load_fused
from molora_fed.training.loop import METRICS_NAME
from molora_fed.types import Split

__all__ = ["choose_prompt", "complete_result", "generate_samples", "write_demo_report"]

PROMPT_TOKENS = 24
NEW_TOKENS = 64
TEMPERATURE = 0.7
TOP_P = 0.9


def choose_prompt(blocks: Blocks, tokenizer: Any) -> str:
    """The start of the first held-out document that is long enough, as text.

    Args:
        blocks: Held-out blocks of a domain.
        tokenizer: Tokenizer of the base.
    """
    length = min(PROMPT_TOKENS, blocks.block_size)
    for row, starts in zip(blocks.tokens, blocks.document_starts, strict=True):
        # A block's first token is rarely a document's, so the second start is the first real one.
        for start in np.flatnonzero(starts)[1:]:
            piece = slice(start, start + length)
            if start + length <= len(row) and not starts[start + 1 : start + length].any():
                return str(tokenizer.decode(row[piece].tolist(), skip_special_tokens=True))
    return str(tokenizer.decode(blocks.tokens[0, :length].tolist(), skip_special_tokens=True))


def generate_samples(
    cooperative: Cooperative, contributors: Sequence[LocalContributor], *, seed: int
) -> list[dict[str, Any]]:
    """Continue one held-out beginning of each domain with the fused model.

    Args:
        cooperative: A cooperative that has published.
        contributors: Who took part; the beginnings are read on their side.
        seed: Seed of sampling.

    Returns:
        The `samples` of report.json, by domain.

    Raises:
        MoloraError: If the fused model or a contribution cannot be read.
    """
    fused = load_fused(cooperative.folder / "fused")
    held_out: dict[str, Blocks] = {}
    for member in contributors:
        path = ContributorHome(member.home).corpus / f"{Split.HELD_OUT}.safetensors"
        held_out.setdefault(member.settings.domain, load_blocks(path))
    domains = sorted(held_out)
    prompts = [choose_prompt(held_out[domain], fused.base.tokenizer) for domain in domains]
    # Single tokens are too little work to share: threads would mostly wait for each other.
    with limit_threads(1):
        sampling = Sampling(NEW_TOKENS, TEMPERATURE, top_p=TOP_P, seed=seed)
        texts = generate(build_causal_lm(fused), prompts, sampling)
    return [
        {"domain": domain, "prompt": text.prompt, "text": text.text, "experts": text.gates}
        for domain, text in zip(domains, texts, strict=True)
    ]


def _list_admitted(cooperative: Cooperative) -> list[Contribution]:
    with cooperative.read_ledger() as ledger:
        return load_admitted(ledger, cooperative.store)


def complete_result(
    result: Mapping[str, Any],
    cooperative: Cooperative,
    contributors: Sequence[LocalContributor],
    *,
    samples: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float],
    command: str,
) -> dict[str, Any]:
    """Add samples, times, threads, bytes sent and corpus reports to a fusion's result.

    Args:
        result: What the coordinator measured.
        cooperative: Where contributions lie.
        contributors: Who took part.
        samples: Generated text.
        seconds: Wall-clock seconds of the phases that the coordinator does not measure.
        command: The command that was run.

    Returns:
        Content of report.json.
    """
    manifests = [contribution.manifest for contribution in _list_admitted(cooperative)]
    metrics = _collect_metrics(contributors)
    compute = {name: dict(value) for name, value in result.get("compute", {}).items()}
    by_name = {n: dict(row) for n, row in compute.get("contributors", {}).items()}
    for name, rows in metrics.items():
        if name in by_name and rows:
            by_name[name]["seconds"] = rows[-1]["seconds"]
    compute["contributors"] = by_name
    base_metrics = cooperative.base_folder / METRICS_NAME
    if "base" in compute and base_metrics.is_file():
        compute["base"]["seconds"] = read_metrics_file(base_metrics)[-1]["seconds"]
    corpus = {name: dict(value) for name, value in result.get("corpus", {}).items()}
    for member in contributors:
        path = ContributorHome(member.home).corpus / "corpus.json"
        if path.is_file():
            report = json.loads(path.read_text(encoding="utf-8"))["report"]
            report.pop("files", None)  # names of files are the contributor's own
            corpus[member.settings.name] = {
                **corpus.get(member.settings.name, {}),
                "report": report,
            }
    return {
        **result,
        "command": command,
        "samples": [dict(sample) for sample in samples],
        "seconds": {**seconds, **result["seconds"]},
        "budget_seconds": dict(BUDGET_SECONDS),
        "threads": {
            **result.get("threads", {}),
            **{member.settings.name: member.settings.threads for member in contributors},
        },
        "compute": compute,
        "corpus": corpus,
        "sent": {
            member.settings.name: count_sent(ContributorHome(member.home))
            for member in contributors
        },
        "bytes": {
            **result["bytes"],
            "sent": {m.contributor: m.num_bytes + len(m.canonical) for m in manifests},
            "samples": {
                m.contributor: sum(entry.bytes for entry in m.sample_files.values())
                for m in manifests
            },
        },
    }


def _collect_metrics(contributors: Sequence[LocalContributor]) -> dict[str, MetricRows]:
    """Training metrics of every contributor that trained here, of its latest training."""
    metrics: dict[str, MetricRows] = {}
    for member in contributors:
        paths = list(ContributorHome(member.home).training.rglob(METRICS_NAME))
        if paths:
            metrics[member.settings.name] = read_metrics_file(max(paths, key=_modified))
    return metrics


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def write_demo_report(
    result: Mapping[str, Any], contributors: Sequence[LocalContributor], folder: Path
) -> Path:
    """Write the report with training curves.

    Returns:
        Path of report.html.

    Raises:
        StorageError: On I/O errors.
    """
    return write_report(result, _collect_metrics(contributors), folder)
