"""lm-evaluation-harness, unchanged, on a demo's fused model and on every specialist, in one load.

`python bench/harness.py DEMO --out docs/results/lm_eval.json`, a minute on one core; needs the
extra `eval`; the page is written beside the JSON. For each domain there is a task of choices (which
of four pieces follows a held-out document's beginning; the other three are of the other domains)
and one of bits per byte.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

import lm_eval  # noqa: E402
import torch  # noqa: E402
from harness_tasks import write_task  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from molora_fed.corpus.blocks import load_blocks  # noqa: E402
from molora_fed.inference.fused_lm import FusedForCausalLM  # noqa: E402

CONTEXT, PIECE, WHOLE = 48, 24, 128


def read_documents(demo: Path, count: int) -> dict[str, list[list[int]]]:
    """The first held-out documents of every domain that are long enough, as token ids."""
    found = {}
    for folder in sorted((demo / "contributors").iterdir()):
        blocks = load_blocks(folder / "corpus" / "held-out.safetensors")
        tokens, documents = blocks.tokens.ravel(), blocks.documents.ravel()
        starts = [0, *((documents[1:] != documents[:-1]).nonzero()[0] + 1).tolist(), len(tokens)]
        parts = [tokens[a:b].tolist() for a, b in pairwise(starts)]
        found[blocks.domain] = [part[:WHOLE] for part in parts if len(part) > WHOLE][:count]
    return found


def write_tasks(documents: dict[str, list[list[int]]], tokenizer: Any, folder: Path) -> list[str]:
    """Two tasks a domain; their names."""
    names, domains = [], sorted(documents)
    for domain, own in documents.items():
        choices = []
        for index, document in enumerate(own):
            pieces = {
                other: documents[other][index % len(documents[other])][CONTEXT : CONTEXT + PIECE]
                for other in domains
            }
            choices.append(
                {
                    "context": tokenizer.decode(document[:CONTEXT]).rstrip(),
                    "choices": [tokenizer.decode(pieces[other]) for other in domains],
                    "answer": domains.index(domain),
                }
            )
        write_task(folder, f"{domain}_choice", "choice", choices)
        texts = [{"text": tokenizer.decode(document)} for document in own]
        write_task(folder, f"{domain}_bits", "rolling", texts)
        names += [f"{domain}_choice", f"{domain}_bits"]
    return names


def score(model: FusedForCausalLM, tokenizer: Any, text: str) -> float:
    """Log-probability of a text, nats, by the model itself."""
    tokens = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text)]])
    log_probs = model(input_ids=tokens).logits[:, :-1]
    return float(log_probs.gather(-1, tokens[:, 1:, None]).sum())


def evaluate(
    model: FusedForCausalLM, harness: Any, names: list[str], manager: Any
) -> dict[str, Any]:
    """Figures of every task, seconds, and how far the harness's numbers are from the model's."""
    began = time.process_time()
    found = lm_eval.simple_evaluate(
        harness, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    seconds = time.process_time() - began
    tokenizer = harness.tokenizer
    differences = [
        abs(sample["resps"][0][0] - score(model, tokenizer, sample["doc"]["text"]))
        for name in names
        if name.endswith("_bits")
        for sample in found["samples"][name]
    ]
    figures = {}
    for name in names:
        metric = "acc" if name.endswith("_choice") else "bits_per_byte"
        figures[name] = found["results"][name][f"{metric},none"]
    return {"figures": figures, "seconds": seconds, "difference_nats": max(differences)}


def write_page(result: dict[str, Any], out: Path) -> None:
    """The page beside the JSON."""
    domains, models = sorted(result["documents"]), result["models"]
    counts = ", ".join(f"{result['documents'][domain]} of {domain}" for domain in domains)
    error = 0.5 / min(result["documents"].values()) ** 0.5
    page = [
        "# lm-evaluation-harness on a fused model and its specialists",
        "",
        f"lm-eval {result['lm_eval']}, unchanged: `HFLM(pretrained=model, tokenizer=...)` on local "
        f"task files. The model is opened once; each specialist "
        "is evaluated by `with model.alone(name):`, the fused model without. "
        f"Held-out documents of {WHOLE} tokens: {counts}. One core.",
        "",
        f"`python bench/harness.py DEMO --documents {result['asked']} --out "
        "docs/results/lm_eval.json` (DEMO: the folder of `molora demo --seed 42`)",
        "",
        "Bits per byte (lower is better):",
        "",
        f"| model | {' | '.join(domains)} | mean |",
        f"|---|{'---|' * (len(domains) + 1)}",
    ]

    def add(kind: str, digits: int) -> None:
        for name, model in models.items():
            own = [model["figures"][f"{domain}_{kind}"] for domain in domains]
            cells = [f"{value:.{digits}f}" for value in [*own, sum(own) / len(own)]]
            page.append(f"| {name} | {' | '.join(cells)} |")

    add("bits", 3)
    page += [
        "",
        "Share of documents whose continuation is told from three of other domains (chance 0.25; "
        f"standard error at most {error:.2f}):",
        "",
        f"| model | {' | '.join(domains)} | mean |",
        f"|---|{'---|' * (len(domains) + 1)}",
    ]
    add("choice", 2)
    worst = max(model["difference_nats"] for model in models.values())
    seconds = {name: model["seconds"] for name, model in models.items()}
    alone = [value for name, value in seconds.items() if name != "fused"]
    page += [
        "",
        f"Log-likelihoods of whole documents are those of `FusedForCausalLM` itself to {worst:.1e} "
        f"nats (sums over {WHOLE} tokens). The fused model took {seconds['fused']:.1f} "
        f"processor seconds, a specialist {min(alone):.1f} to {max(alone):.1f}: others do not run "
        "meanwhile. Choices are told apart by how likely each is, and the fused model makes every "
        "domain's pieces likelier, the wrong ones too.",
    ]
    out.write_text("\n".join(page) + "\n", encoding="utf-8")


def main() -> None:
    """Open once, evaluate all, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("demo", type=Path)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    model = FusedForCausalLM.from_pretrained(args.demo / "cooperative")
    loaded = time.process_time() - began
    assert model.base is not None
    tokenizer = model.base.tokenizer
    documents = read_documents(args.demo, args.documents)
    models = {}
    with tempfile.TemporaryDirectory() as name:
        names = write_tasks(documents, tokenizer, Path(name))
        manager = TaskManager(include_path=name, include_defaults=False)
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
        models["fused"] = evaluate(model, harness, names, manager)
        for expert in model.expert_names:
            with model.alone(expert):
                models[expert] = evaluate(model, harness, names, manager)
    result = {
        "lm_eval": lm_eval.__version__,
        "documents": {domain: len(own) for domain, own in documents.items()},
        "asked": args.documents,
        "load_seconds": loaded,
        "models": models,
    }
    if args.out is None:
        print(json.dumps(result, indent=1))
        return
    text = json.dumps(result, indent=1, sort_keys=True) + "\n"
    args.out.write_text(text, encoding="utf-8")
    write_page(result, args.out.with_suffix(".md"))


if __name__ == "__main__":
    main()
