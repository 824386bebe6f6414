"""One process against two under `accelerate launch`, on two CPU cores: losses, adapters, seconds.

    python bench/launcher.py --base BASE     # a folder; the built-in base takes a minute or two

Trains a LoRA on this repository's pages by one process on two threads and by two on one each, and
writes docs/results/launcher.md.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from molora_fed.adapters.files import load_adapter
from molora_fed.charter import AdapterRules, TrainingRules
from molora_fed.corpus.blocks import Blocks
from molora_fed.models.base import Base, load_base
from molora_fed.models.runtime import Placement
from molora_fed.training.adapter_job import Specialist
from molora_fed.training.choices import TrainingChoices
from molora_fed.training.specialists import train_specialist
from molora_fed.types import Split

REPOSITORY = Path(__file__).parents[1]
OUT = REPOSITORY / "docs" / "results" / "launcher.md"
LAUNCHER = "accelerate launch --multi_gpu --num_processes 2 --main_process_port 0"
RUNS = (("float32", 4), ("float32", 3), ("bfloat16", 4))  # and blocks in a batch
TOKENS, VALIDATION = 64, 16
TOLERANCE = 1e-4  # nats, in float32


def cut(base: Base) -> tuple[Blocks, Blocks]:
    """Blocks to train on and to validate on, of the pages in docs."""
    text = "\n".join(p.read_text(encoding="utf-8") for p in sorted(REPOSITORY.glob("docs/*.md")))
    ids = np.array(base.tokenizer(text[:400_000])["input_ids"], dtype=np.int32)
    rows = ids[: len(ids) // TOKENS * TOKENS].reshape(-1, TOKENS)
    rows = rows[np.random.default_rng(0).permutation(len(rows))]

    def make(split: Split, tokens: np.ndarray) -> Blocks:
        owners = np.broadcast_to(np.arange(len(tokens), dtype=np.int32)[:, None], tokens.shape)
        return Blocks("pages", split, tokens, owners.copy(), owners.copy())

    return make(Split.TRAIN, rows[VALIDATION:]), make(Split.VALIDATION, rows[:VALIDATION])


def train(base: Base, batch: int, steps: int, folder: Path, launcher: str) -> Specialist:
    """A specialist of a LoRA."""
    training = TrainingRules(rank=16, steps=steps, batch=batch, validate_every=steps // 2)
    return train_specialist(
        base,
        *cut(base),
        kind="lora",
        rules=AdapterRules(),
        training=training,
        seed=1,
        threads=2,
        folder=folder,
        choices=TrainingChoices(launcher=launcher),
    )


def compare(one: Path, two: Path) -> float:
    """Largest difference between two adapters' changes, relative to the largest change."""
    first, second = load_adapter(one).updates, load_adapter(two).updates
    products = [(update.product(), second[name].product()) for name, update in first.items()]
    largest = max(float(a.abs().max()) for a, _ in products)
    return max(float((a - b).abs().max()) for a, b in products) / largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of the base")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=OUT, help="where the page goes")
    given = parser.parse_args()
    rows = []
    for dtype, batch in RUNS:
        base = load_base(given.base, Placement(dtype=getattr(torch, dtype)))
        with tempfile.TemporaryDirectory() as root:
            ended, seconds = [], []
            for name, launcher in (("one", ""), ("two", LAUNCHER)):
                started = time.perf_counter()
                ended.append(train(base, batch, given.steps, Path(root) / name, launcher))
                seconds.append(time.perf_counter() - started)
            one, two = ended
            difference = compare(one.adapter_folder, two.adapter_folder)
        figures = f"{one.base_loss:.6f} | {one.loss:.6f} | {two.loss:.6f}"
        away = f"{two.loss - one.loss:+.1e} | {difference:.1e}"
        rows.append(
            f"| {dtype} | {batch} | {figures} | {away} | {seconds[0]:.0f} | {seconds[1]:.0f} |"
        )
        print(rows[-1], flush=True)
        if dtype == "float32" and not abs(two.loss - one.loss) < TOLERANCE:
            raise SystemExit(f"two processes are more than {TOLERANCE} nats from one")
    lines = [
        "# One process and two under `accelerate launch`",
        "",
        f"`python bench/launcher.py --base BASE`: a LoRA of rank 16, {given.steps} steps, "
        f"blocks of {TOKENS} tokens of this",
        f"repository's pages, on {base.id}. One process has two threads, two have one",
        "each, both on CPUs (gloo); the launcher is",
        f"`{LAUNCHER}`.",
        "Losses are on all validation blocks, nats per token; the adapters' difference is the",
        "largest of `scale * B @ A` over all modules, relative to its largest entry. Seconds are",
        "of everything, the two processes' start and loading of the base included, on a machine",
        "with other work.",
        "",
        "| dtype | batch | base | one process | two processes | loss apart | adapters apart | s, one | s, two |",  # noqa: E501
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"In float32 losses are to be within {TOLERANCE} nats; the program fails otherwise. A",
        "batch of three is split into two blocks and one. Of equal halves the gradients can be the",
        "same to the bit, where the library of matrix products cuts long sums into equal halves,",
        "too. In bfloat16 every product is rounded, and steps that differ in the last bit go apart",
        "from there. That a run killed in one process and begun again ends with the same bytes is",
        "tested: `tests/unit/training/test_launched.py`.",
        "",
    ]
    given.out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
