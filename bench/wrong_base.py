"""Adapters of other bases with the same shapes: what the admission check `claimed-base` goes by.

Tiny random Llamas, untrained or trained on this repository's pages, each take a LoRA that plain
PEFT trained on one of them: its gain in nats, and the gains of its shuffled copies. Writes
docs/results/wrong_base.md: `python bench/wrong_base.py [--out FILE]`, about two minutes.
"""

import argparse
import copy
import random
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

import torch  # noqa: E402
from adapter_folders import train_with_peft  # noqa: E402

from molora_fed.adapters.compatibility import applied  # noqa: E402
from molora_fed.adapters.files import load_adapter  # noqa: E402
from molora_fed.adapters.updates import Adapter  # noqa: E402
from molora_fed.contributions.checks import SHUFFLED_SHARE, SHUFFLES, _shuffle  # noqa: E402
from molora_fed.models.forward import compute_block_losses  # noqa: E402
from molora_fed.testing.models import build_tiny_model, build_tiny_tokenizer  # noqa: E402

OUT = REPOSITORY / "docs" / "results" / "wrong_base.md"
TEXTS = ("README.md", "docs/protocol.md", "docs/federation.md")
SEEDS = range(4, 8)
PRETRAINING = (0, 300)


def cut(text: str, size: int) -> torch.Tensor:
    """Blocks of tokens, (N, size)."""
    ids = torch.tensor(build_tiny_tokenizer()(text)["input_ids"])
    return ids[: len(ids) // size * size].view(-1, size)


def make_domain() -> tuple[torch.Tensor, torch.Tensor]:
    """Train and test blocks of words that no page holds."""
    draw = random.Random(0)
    words = (draw.choice("abcd") * 2 + str(draw.randrange(10)) for _ in range(2_880))
    blocks = cut(" ".join(words), 16)
    return blocks[:-64], blocks[-64:]


def make_base(seed: int, steps: int) -> Any:
    """A tiny Llama, trained for `steps` steps on the pages."""
    model = build_tiny_model("llama", seed=seed)
    torch.manual_seed(seed)
    blocks = cut("".join((REPOSITORY / name).read_text() for name in TEXTS), 32)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        batch = blocks[torch.randint(0, len(blocks), (16,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="where the page goes")
    out = parser.parse_args().out
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    train, test = make_domain()

    def measure(model: Any, adapter: Adapter | None) -> float:
        with applied(model, adapter) as ready:
            return float(compute_block_losses(ready, test, batch=16).double().mean())

    rows, verdicts = [], []
    for steps in PRETRAINING:
        bases = [make_base(seed, steps) for seed in SEEDS]
        with tempfile.TemporaryDirectory() as root:
            adapters = []
            for seed, base in zip(SEEDS, bases, strict=True):
                train_with_peft(Path(root) / str(seed), copy.deepcopy(base), train)
                adapters.append(load_adapter(Path(root) / str(seed)))
        for mine, base in zip(SEEDS, bases, strict=True):
            start = measure(base, None)
            for theirs, adapter in zip(SEEDS, adapters, strict=True):
                gain = start - measure(base, adapter)
                shuffled = [start - measure(base, _shuffle(adapter, s)) for s in range(SHUFFLES)]
                held = gain < 0.01 or max(shuffled) > SHUFFLED_SHARE * gain
                verdicts.append((mine == theirs, held))
                rows.append(
                    f"| {steps} | {mine} | {theirs} | {gain:+.3f} | {max(shuffled):+.3f} | "
                    f"{'held back' if held else 'passes'} |"
                )
                print(rows[-1], flush=True)
    right = [held for is_own, held in verdicts if is_own]
    wrong = [held for is_own, held in verdicts if not is_own]
    page = [
        "# Adapters of another base with the same shapes",
        "",
        f"`python bench/wrong_base.py`: tiny Llamas (D = 32), seeds {SEEDS.start} to "
        f"{SEEDS.stop - 1}, untrained or trained for {PRETRAINING[1]} steps on pages of this "
        "repository; LoRAs of rank 4, trained by plain PEFT for 30 steps on a made-up domain. "
        f"Gain and the best gain of {SHUFFLES} shuffled copies, nats per token on 64 blocks of 16 "
        f"tokens. Of {len(wrong)} adapters on another base {sum(wrong)} are held back, of "
        f"{len(right)} on their own {sum(right)}. The bases are tiny and have nothing in common; "
        "relatives, such as an instruct model and its base, share coordinates, and pass if the "
        "adapter gains.",
        "",
        "| steps of the bases | base | adapter's base | gain | best shuffled | check |",
        "|---:|---:|---:|---:|---:|---|",
        *rows,
    ]
    out.write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
