"""Speed and exactness at size: banks, dtypes, frozen depth, training and its memory.

    make smollm2
    python bench/scale.py --base bases/smollm2 --out docs/results/scale.json
    python bench/scale.py --base FOLDER --only bank dtype    # parts of it

Ours and its rival take turns, `--rounds` times in one run. Times are of the processor, on one
thread, which others on the machine disturb least; a ratio is that of the medians, with the smallest
and the largest of single rounds.

- `bank`: a bank of two experts against plain batched forwards of the same models.
- `batch`: tokens per second by the blocks of a pass, 1, 2, 4, ... up to `--blocks`.
- `applying`: a LoRA added into the weights (merged, as a bank does it) against its two thin
  products beside each of them, on `--blocks` blocks; other numbers follow from these times.
- `dtype`: a pass in bfloat16 against float32, and how far losses and their differences are apart.
- `verdicts`: two small LoRAs, trained here, and what admission and guard compare with thresholds,
  in bfloat16 and in float32.
- `frozen`: banks of 4 and 8 experts with half of the blocks frozen against none, beside the limit
  that arithmetic sets.
- `training`: a LoRA training against transformers' Trainer with PEFT.
- `memory`: a step of 4 x 512 tokens with losses in parts and activations made again against a step
  with all logits and all activations, each in a process of its own.
- `estimate`: the peak of LoRA trainings of 2 and 4 blocks a step, with and without --checkpointing,
  each in a process of its own, against the bytes that the training said it needs.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.nn.functional import linear

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.kinds import LoraKind
from molora_fed.adapters.updates import Adapter
from molora_fed.bank import Expert, build_calibration_bank
from molora_fed.charter import AdapterRules
from molora_fed.corpus.blocks import Blocks
from molora_fed.models.base import load_base
from molora_fed.models.batches import choose_batch
from molora_fed.models.forward import compute_block_losses
from molora_fed.models.head import find_head
from molora_fed.models.layout import decoder_blocks
from molora_fed.models.runtime import Placement, describe_environment, mixed_precision
from molora_fed.storage.files import write_json
from molora_fed.testing import build_random_adapter
from molora_fed.training.language_model import TrainConfig, train
from molora_fed.types import Split

REPOSITORY = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RANK = 16
BARS = {
    "bank": "tokens/s of a plain forward, at least 0.95",
    "batch": "nothing is gained above 2,048 tokens a pass",
    "applying": "none: the faster one is to be known",
    "verdicts": "none: how far what is compared with a threshold moves is to be known",
    "dtype": "at least 2.5 where the processor has AVX512-BF16; losses within 0.003 nats, "
    "differences within 0.0005",
    "frozen": "at least 0.9 of the limit",
    "training": "tokens/s of the Trainer, at least 1",
    "memory": "at most 0.4 of the peak at most 1.3 times the time",
    "estimate": "within a factor of 1.5 of the peak",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=REPOSITORY / "bases" / "smollm2")
    parser.add_argument("--only", nargs="+", choices=tuple(BARS), default=tuple(BARS))
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512, help="of a block")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON of the figures")
    parser.add_argument("--child", choices=("plain", "ours", "estimate"), help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child == "estimate":
        print(json.dumps(measure_training_peak(arguments)))
        return
    if arguments.child:
        print(json.dumps(measure_step(arguments, arguments.child == "ours")))
        return
    results = {}
    for name in arguments.only:
        results[name] = {"bar": BARS[name], **PARTS[name](arguments)}
        print(name, json.dumps(results[name], indent=1), flush=True)
    if arguments.out:
        write_json(arguments.out, {**describe(arguments), "parts": results})


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    base = load_base(arguments.base)
    options = {name: getattr(arguments, name) for name in ("dtype", "rounds", "tokens", "blocks")}
    command = "python bench/scale.py --base BASE" + "".join(
        f" --{name} {value}" for name, value in options.items()
    )
    return {
        "command": command,
        "base": {"id": base.id, "revision": base.revision, "weights": base.weights},
        "environment": describe_environment("cpu"),
        **options,
    }


def open_base(arguments: argparse.Namespace, dtype: str = "") -> Any:
    return load_base(arguments.base, Placement(dtype=DTYPES[dtype or arguments.dtype]))


def read_blocks(base: Any, arguments: argparse.Namespace) -> Blocks:
    """Blocks of this repository's pages: text that no base was made for."""
    pages = sorted((REPOSITORY / "docs").glob("*.md"))
    ids: list[int] = []
    for page in pages:
        ids += base.tokenizer(page.read_text(encoding="utf-8"))["input_ids"]
    count, size = arguments.blocks, arguments.tokens
    tokens = np.array(ids[: count * size], dtype=np.int32).reshape(count, size)
    rows = np.repeat(np.arange(count, dtype=np.int32)[:, None], size, axis=1)
    return Blocks("pages", Split.CALIBRATION, tokens, rows, rows.copy())


def spend(call: Callable[[], Any]) -> float:
    """Seconds of the processor that a call takes."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    call()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(rounds: int, ours: Callable[[], Any], rival: Callable[[], Any]) -> dict[str, Any]:
    """How many times as fast ours is."""
    pairs = [(spend(ours), spend(rival)) for _ in range(rounds)]
    mine, others = ([pair[place] for pair in pairs] for place in (0, 1))
    single = [other / own for own, other in pairs]
    return {
        "ratio": round(statistics.median(others) / statistics.median(mine), 3),
        "rounds": [round(min(single), 3), round(max(single), 3)],
        "seconds": [round(statistics.median(mine), 2), round(statistics.median(others), 2)],
    }


def build_bank(base: Any, experts: Sequence[Expert], blocks: Blocks, depth: int = 0) -> None:
    with tempfile.TemporaryDirectory() as folder:
        build_calibration_bank(
            Path(folder), base, experts, [blocks],
            readings=frozenset({"evidence"}), batch=len(blocks), frozen_depth=depth,
        )  # fmt: skip


def make_experts(model: Any, count: int, depth: int = 0) -> list[Expert]:
    adapters = [
        build_random_adapter(model, rank=RANK, seed=seed, frozen_depth=depth, strength=0.01)
        for seed in range(1, count)
    ]
    return [Expert("base", None), *(Expert(f"e{i}", a) for i, a in enumerate(adapters))]


def measure_bank(arguments: argparse.Namespace) -> dict[str, Any]:
    base = open_base(arguments)
    blocks, experts = read_blocks(base, arguments), make_experts(base.model, 2)
    tokens = torch.from_numpy(blocks.tokens).long()

    @torch.inference_mode()
    def run_plainly() -> None:
        for expert in experts:
            with applied(base.model, expert.load()) as model:
                model(input_ids=tokens, use_cache=False)

    found = compare(arguments.rounds, lambda: build_bank(base, experts, blocks), run_plainly)
    return {**found, "tokens": 2 * blocks.tokens.size}


def measure_batch(arguments: argparse.Namespace) -> dict[str, Any]:
    base = open_base(arguments)
    tokens = read_blocks(base, arguments).tokens
    sizes = [2**power for power in range(arguments.blocks.bit_length())]
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    compute_block_losses(base.model, tokens[:1], batch=1)
    for _ in range(arguments.rounds):
        for size in sizes:
            seconds[size].append(
                spend(lambda size=size: compute_block_losses(base.model, tokens, batch=size))
            )
    speeds = {
        size * arguments.tokens: round(tokens.size / statistics.median(each))
        for size, each in seconds.items()
    }
    return {"tokens_per_second_by_tokens_of_a_pass": speeds}


@contextmanager
def thin_products(model: Any, adapter: Adapter) -> Iterator[Any]:
    """Leave the weights alone; each adapted layer adds its two thin products."""
    with ExitStack() as stack:
        for name, update in adapter.updates.items():
            module = model.get_submodule(name)
            a, b = (factor.to(module.weight.dtype) for factor in (update.a, update.b))

            def add(_: Any, x: Any, out: Any, a: Any = a, b: Any = b, s: Any = update.scale) -> Any:
                return out.add_(linear(linear(x[0], a), b), alpha=s)

            stack.callback(module.register_forward_hook(add).remove)
        yield model


def measure_applying(arguments: argparse.Namespace) -> dict[str, Any]:
    base = open_base(arguments)
    tokens = read_blocks(base, arguments).tokens
    adapter = build_random_adapter(base.model, rank=RANK, seed=1, strength=0.01)
    losses, seconds = {}, {"apply": [], "merged": [], "beside": []}

    def run(name: str) -> None:
        found = compute_block_losses(base.model, tokens, batch=choose_batch(arguments.tokens))
        losses[name] = float(found.double().mean())

    def apply() -> None:
        with applied(base.model, adapter):
            pass

    for _ in range(arguments.rounds):
        seconds["apply"].append(spend(apply))
        with applied(base.model, adapter):
            seconds["merged"].append(spend(lambda: run("merged")))
        with thin_products(base.model, adapter):
            seconds["beside"].append(spend(lambda: run("beside")))
    once, merged, beside = (statistics.median(each) for each in seconds.values())
    count = arguments.blocks
    by_blocks = {
        str(blocks): round((once + merged / count * blocks) / (beside / count * blocks), 3)
        for blocks in (8, 40, 312)
    }
    return {
        "seconds": {name: [round(one, 3) for one in each] for name, each in seconds.items()},
        "merged_over_beside_by_blocks": by_blocks,
        "equal_at_blocks": round(once / max(beside - merged, 1e-9) * count, 2),
        "losses_nats": losses,
    }


def measure_verdicts(arguments: argparse.Namespace) -> dict[str, Any]:
    base = open_base(arguments, "bfloat16")
    blocks = read_blocks(base, arguments)
    half = len(blocks) // 2
    folders = tempfile.TemporaryDirectory()
    adapters = []
    for seed, part in enumerate((blocks.tokens[:half], blocks.tokens[half:])):
        kind = LoraKind()
        model, parameters = kind.prepare(base.model, AdapterRules(max_rank=RANK), RANK, seed=seed)
        config = TrainConfig(
            steps=4, batch=1, learning_rate=1e-3, seed=seed, threads=1, validate_every=4,
            evaluation_batch=1,
        )  # fmt: skip
        train(model, parameters, part, part[:1, :32], config, Path(folders.name) / f"t{seed}")
        folder = Path(folders.name) / f"a{seed}"
        kind.export(model, base.model, folder, RANK, AdapterRules(max_rank=RANK))
        adapters.append(kind.load(folder, None, name=folder.name))
    found = {}
    for name in ("bfloat16", "float32"):
        own = base if name == "bfloat16" else open_base(arguments, name)
        columns = []
        for each in (None, *adapters):
            with applied(own.model, each) as model:
                columns.append(compute_block_losses(model, blocks.tokens, batch=4).double())
        found[name] = compare_with_thresholds(columns, half)
    apart = {k: round(v - found["float32"][k], 6) for k, v in found["bfloat16"].items()}
    folders.cleanup()
    return {"nats": found, "bfloat16_less_float32": apart}


def compare_with_thresholds(columns: Sequence[torch.Tensor], half: int) -> dict[str, float]:
    """What is compared with thresholds, nats: of base, first and second adapter, (N, T-1) each."""
    base, *adapters = columns
    mixed = math.log(len(columns)) - torch.logsumexp(torch.stack([-each for each in columns]), 0)
    texts = (slice(0, half), slice(half, None))
    figures = {"start, the base alone": float(base.mean())}
    for index, own in enumerate(adapters):
        for text, rows in enumerate(texts):
            change = float((own - base)[rows].mean())
            figures[f"adapter {index} less base on text {text}"] = change
    for text, rows in enumerate(texts):
        best = min(float(each[rows].mean()) for each in columns)
        excess = float(mixed[rows].mean()) - best
        figures[f"equal mixture less best expert on text {text}"] = excess
    return figures


def measure_dtype(arguments: argparse.Namespace) -> dict[str, Any]:
    bases = {name: open_base(arguments, name) for name in ("bfloat16", "float32")}
    blocks = read_blocks(bases["float32"], arguments)
    adapter = build_random_adapter(bases["float32"].model, rank=RANK, seed=1, strength=0.05)
    losses: dict[str, list[float]] = {}

    def run(name: str) -> None:
        losses[name] = []
        for each in (None, adapter):
            with applied(bases[name].model, each) as model:
                found = compute_block_losses(
                    model, blocks.tokens, batch=choose_batch(arguments.tokens)
                )
            losses[name].append(float(found.double().mean()))

    speed = compare(arguments.rounds, lambda: run("bfloat16"), lambda: run("float32"))
    apart = [one - other for one, other in zip(losses["bfloat16"], losses["float32"], strict=True)]
    return {
        **speed,
        "blocks": len(blocks),
        "losses_nats": losses,
        "largest_difference_of_a_loss_nats": max(map(abs, apart)),
        "difference_of_a_difference_nats": abs(apart[1] - apart[0]),
    }


def measure_frozen(arguments: argparse.Namespace) -> dict[str, Any]:
    base = open_base(arguments)
    blocks = read_blocks(base, arguments)
    depth = len(decoder_blocks(base.model)[1]) // 2
    share = find_share(base.model, depth)
    found: dict[str, Any] = {"frozen_blocks": depth, "share_of_a_pass": round(share, 3)}
    for count in (4, 8):
        experts = make_experts(base.model, count, depth)
        limit = count / (share + count * (1 - share))
        one = compare(
            arguments.rounds,
            lambda experts=experts: build_bank(base, experts, blocks, depth),
            lambda experts=experts: build_bank(base, experts, blocks),
        )
        found[f"{count} experts"] = {
            **one, "limit": round(limit, 3), "of_limit": round(one["ratio"] / limit, 3),
        }  # fmt: skip
    return found


def find_share(model: Any, depth: int) -> float:
    """Share of a forward pass's multiplications that lie in the first blocks."""
    head = model.get_output_embeddings().weight.numel()
    blocks = decoder_blocks(model)[1]
    sizes = [sum(p.numel() for p in block.parameters() if p.ndim > 1) for block in blocks]
    return sum(sizes[:depth]) / (sum(sizes) + head)


def measure_training(arguments: argparse.Namespace) -> dict[str, Any]:
    base = open_base(arguments)
    blocks = read_blocks(base, arguments).tokens
    steps, batch = 4, 2
    losses: dict[str, float] = {}

    def train_ours() -> None:
        rules = AdapterRules(max_rank=RANK)
        model, parameters = LoraKind().prepare(base.model, rules, RANK, seed=0)
        config = TrainConfig(
            steps=steps, batch=batch, learning_rate=1e-3, seed=0, threads=1, validate_every=steps,
            evaluation_batch=1,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            train(model, parameters, blocks, blocks[:1, :32], config, Path(folder))
            lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        losses["ours"] = json.loads(lines[-1])["loss"]

    def train_with_trainer() -> None:
        losses["trainer"] = run_trainer(base.model, blocks, steps, batch, arguments.dtype)

    found = compare(arguments.rounds, train_ours, train_with_trainer)
    return {**found, "tokens": steps * batch * arguments.tokens, "last_losses_nats": losses}


def run_trainer(base_model: Any, blocks: Any, steps: int, batch: int, dtype: str) -> float:
    """The same training by transformers' Trainer and PEFT; its mean loss."""
    import copy

    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, use_rslora=True, lora_dropout=0.0,
        target_modules="all-linear",
    )  # fmt: skip
    model = get_peft_model(copy.deepcopy(base_model), config)
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in blocks]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch,
            learning_rate=1e-3, bf16=dtype == "bfloat16", use_cpu=True, report_to=[], seed=0,
            save_strategy="no", logging_strategy="no", disable_tqdm=True, max_grad_norm=1.0,
        )  # fmt: skip
        done = Trainer(model=model, args=settings, train_dataset=rows).train()
    return float(done.training_loss)


def measure_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for child in ("ours", "plain"):
        found[child] = run_child(arguments, "--child", child)
    return {
        **found,
        "peak": round(found["ours"]["peak_bytes"] / found["plain"]["peak_bytes"], 3),
        "time": round(found["ours"]["seconds"] / found["plain"]["seconds"], 3),
    }


def run_child(arguments: argparse.Namespace, *more: str) -> dict[str, Any]:
    """What a process of its own finds."""
    command = [
        sys.executable, __file__, "--base", str(arguments.base), "--dtype", arguments.dtype, *more,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_estimate(arguments: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for blocks in (2, 4):
        for checkpointing in (False, True):
            more = ["--checkpointing"] if checkpointing else []
            one = run_child(arguments, "--child", "estimate", "--blocks", str(blocks), *more)
            one["ratio"] = round(one["needed_bytes"] / one["peak_bytes"], 2)
            found[" ".join([f"{blocks} blocks", *more])] = one
    return found


def measure_training_peak(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak of a training's resident bytes above those of before, and what it said it needs."""
    base = open_base(arguments)
    blocks = read_blocks(base, arguments).tokens
    model, parameters = LoraKind().prepare(base.model, AdapterRules(max_rank=RANK), RANK, seed=0)
    config = TrainConfig(
        steps=2, batch=len(blocks), learning_rate=1e-3, seed=0, threads=1, validate_every=2,
        evaluation_batch=2, checkpointing=arguments.checkpointing,
    )  # fmt: skip
    told = []
    with tempfile.TemporaryDirectory() as folder, watching_peak() as peak:
        train(
            model, parameters, blocks, blocks, config, Path(folder),
            on_memory=lambda *counts: told.extend(counts),
        )  # fmt: skip
    return {"needed_bytes": told[0], "peak_bytes": peak()}


@contextmanager
def watching_peak() -> Iterator[Callable[[], int]]:
    """The most resident bytes inside, above those of before."""
    process, is_over = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not is_over.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: peak - before
    finally:
        is_over.set()
        watcher.join()


def measure_step(arguments: argparse.Namespace, is_ours: bool) -> dict[str, Any]:
    """Peak above what the process has before, and time, of a LoRA step of 4 x 512 tokens."""
    base = open_base(arguments)
    model, parameters = LoraKind().prepare(base.model, AdapterRules(max_rank=RANK), RANK, seed=0)
    for parameter in parameters:
        parameter.data = parameter.data.float()
    placement = Placement(dtype=DTYPES[arguments.dtype])
    head = find_head(model)
    if is_ours:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(0, vocabulary, (4, 513), generator=torch.Generator().manual_seed(0))

    def take_step() -> None:
        with mixed_precision(placement):
            if is_ours and head is not None:
                losses = head.compute_losses(tokens)
            else:
                logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
                losses = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
                )
        losses.mean().backward()

    with watching_peak() as peak:
        seconds = spend(take_step)
    return {"peak_bytes": peak(), "seconds": round(seconds, 2)}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "bank": measure_bank,
    "batch": measure_batch,
    "applying": measure_applying,
    "verdicts": measure_verdicts,
    "dtype": measure_dtype,
    "frozen": measure_frozen,
    "training": measure_training,
    "memory": measure_memory,
    "estimate": measure_estimate,
}


if __name__ == "__main__":
    main()
