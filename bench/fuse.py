"""Time to a fused linear router: on the bank, and in a plain loop that runs every expert each step.

    python bench/fuse.py --mixture probability  # N_cal = 300, 600, 2000 and E = 2, 4, 8
    python bench/fuse.py --mixture logit        # a quarter of an hour each
    python bench/fuse.py --quick                # a fifth of the steps and of the data, E = 2

Both sides take the same 500 steps on the same batches of the same blocks, in float32, with the
same threads, and must end with the same router (checked). The base has the built-in base's size;
its weights and adapters are random, which changes no timing. The reference holds all experts in
memory with their adapters already merged, and only its loop is timed. The bank's side is timed
from the adapters' files to the fitted router: E + 1 passes, writing and syncing columns, fitting.
The bank is built up to three times, with parts of the reference's loop in between, so that both
sides meet the same neighbours. A ratio's spread is from the fastest part of the loop over the
slowest bank to the slowest part over the fastest bank.

bound = steps * batch * E / (N_cal * (E + 1)): the ratio of sequence passes.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from molora_kalavai.evidence import EvidenceOptions, EvidenceRouter
from molora_kalavai.linear import LinearOptions, LinearRouter
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.save import save_adapter
from molora_fed.bank import CalibrationBank, Expert, build_calibration_bank
from molora_fed.corpus.blocks import Blocks
from molora_fed.routing.causal import causal_mean
from molora_fed.routing.fitting import draw_batches
from molora_fed.storage.files import write_json
from molora_fed.testing.models import build_random_adapter
from molora_fed.types import Mixture, Split

BLOCK_SIZE = 128
VOCABULARY = 2048
HIDDEN = 128
LAYERS = 4
HEADS = 4
RANK = 32
SEED = 42
PARTS = 5  # the reference's steps are timed in these
BANK_AGAIN_AFTER = (2, 4)  # parts
LARGEST_REPEATED = 600  # blocks


@dataclass(frozen=True)
class Row:
    """One comparison. Times are wall-clock seconds; `bank_seconds` is the median."""

    mixture: Mixture
    num_experts: int
    num_blocks: int
    reference_seconds: float
    reference_part_seconds: list[float]
    bank_seconds: float
    all_bank_seconds: list[float]
    fit_seconds: float
    further_seconds: dict[str, float]
    ratio: float
    ratio_low: float
    ratio_high: float
    bound: float
    bound_fraction: float
    further_ratio: dict[str, float]
    largest_gate_difference: float


def build_base() -> Any:
    """A random GPT-NeoX of the built-in base's size."""
    torch.manual_seed(SEED)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN,
        max_position_embeddings=BLOCK_SIZE,
    )
    return GPTNeoXForCausalLM(config).eval().requires_grad_(False)


def build_blocks(count: int) -> list[Blocks]:
    """Random calibration blocks of four domains, documents of about 60 tokens."""
    generator = np.random.default_rng(SEED)
    shares = [count // 4 + (index < count % 4) for index in range(4)]
    blocks = []
    for index, size in enumerate(shares):
        shape = (size, BLOCK_SIZE)
        tokens = generator.integers(0, VOCABULARY, shape, dtype=np.int32)
        documents = np.cumsum(generator.random(size * BLOCK_SIZE) < 1 / 60).reshape(shape)
        documents = documents.astype(np.int32)
        blocks.append(Blocks(f"domain-{index}", Split.CALIBRATION, tokens, documents, documents))
    return blocks


def save_experts(folder: Path, model: Any, count: int) -> list[Expert]:
    """Adapters on disk, loaded when their turn comes."""
    experts = []
    for index in range(count):
        path = folder / f"expert-{index}"
        if not path.exists():
            adapter = build_random_adapter(model, rank=RANK, seed=index, strength=0.3)
            save_adapter(adapter, model, path)
        experts.append(Expert(path.name, lambda path=path: load_adapter(path)))
    return experts


def merge_experts(base: Any, experts: list[Expert]) -> list[Any]:
    """Whole models with their adapters merged, all in memory."""
    merged = []
    for expert in experts:
        with applied(base.model, expert.load()) as model:
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        copy = build_base()
        copy.load_state_dict(state)
        merged.append(copy)
    return merged


def run_reference(
    models: list[Any], bank: CalibrationBank, weight: Tensor, schedule: Tensor, mixture: Mixture
) -> Iterator[float]:
    """Fit W in place in the plain way: every expert runs on every batch, without gradients.

    All of it is vectorised over blocks, tokens and vocabulary; logits are made only where the
    mixture needs them (once per expert for probabilities, once per batch for logits).

    Yields:
        Seconds of each of the equal parts the steps are cut into.
    """
    optimizer = torch.optim.AdamW([weight], lr=1e-3, fused=True)
    for part in schedule.chunk(PARTS):
        start = time.perf_counter()
        _run_steps(models, bank, weight, part, mixture, optimizer)
        yield time.perf_counter() - start


def _run_steps(
    models: list[Any],
    bank: CalibrationBank,
    weight: Tensor,
    schedule: Tensor,
    mixture: Mixture,
    optimizer: torch.optim.Optimizer,
) -> None:
    head = models[0].get_output_embeddings().weight
    for rows in schedule:
        tokens = bank.tokens.index_select(0, rows).long()
        targets = tokens[:, 1:]
        with torch.no_grad():
            hidden = [model.base_model(input_ids=tokens).last_hidden_state for model in models]
            pooled = causal_mean(
                torch.stack(hidden).mean(0), bank.document_starts.index_select(0, rows)
            )[:, :-1]
            if mixture == "probability":
                logprob = torch.stack([_read_logprob(h, head, targets) for h in hidden], dim=-1)
            else:
                states = torch.stack([h[:, :-1] for h in hidden], dim=2)
        scores = pooled @ weight.T
        if mixture == "probability":
            loss = -torch.logsumexp(torch.log_softmax(scores, -1) + logprob, -1).mean()
        else:
            mixed = torch.einsum("bte,bted->btd", torch.softmax(scores, -1), states)
            loss = functional.cross_entropy((mixed @ head.T).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _read_logprob(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    logits = functional.linear(hidden[:, :-1], head).flatten(0, 1)
    losses = functional.cross_entropy(logits, targets.flatten(), reduction="none")
    return -losses.view(targets.shape)


def run_bank(
    folder: Path,
    base: Any,
    experts: list[Expert],
    blocks: list[Blocks],
    mixture: Mixture,
    steps: int,
    batch: int,
) -> tuple[CalibrationBank, LinearRouter, float, float]:
    """Build a bank from nothing and fit W on it; seconds of both together, and of the fit."""
    start = time.perf_counter()
    bank = build_calibration_bank(
        folder,
        base,
        experts,
        blocks,
        readings=frozenset({"mean_hidden", "evidence"}),
        mixture=mixture,
        batch=batch,
    )
    built = time.perf_counter()
    router = LinearRouter.fit(bank, LinearOptions(steps=steps, batch=batch), SEED)
    end = time.perf_counter()
    return bank, router, end - start, end - built


def time_further(bank: CalibrationBank, steps: int, batch: int) -> dict[str, float]:
    """Seconds of each further router on a bank that exists."""
    options = LinearOptions(steps=steps, batch=batch)
    fits: dict[str, Callable[[], Any]] = {
        "linear, another seed": lambda: LinearRouter.fit(bank, options, SEED + 1),
        "evidence": lambda: EvidenceRouter.fit(bank, EvidenceOptions(), SEED),
    }
    seconds = {}
    for name, fit in fits.items():
        start = time.perf_counter()
        fit()
        seconds[name] = time.perf_counter() - start
    return seconds


def compare(
    base: Any, experts: list[Expert], num_blocks: int, mixture: Mixture, steps: int, batch: int
) -> Row:
    """Run both sides on the same data and check that they end with the same router."""
    blocks = build_blocks(num_blocks)

    def run_our_side() -> tuple[CalibrationBank, LinearRouter, float, float]:
        with tempfile.TemporaryDirectory() as folder:
            return run_bank(Path(folder), base, experts, blocks, mixture, steps, batch)

    with tempfile.TemporaryDirectory() as folder:
        bank, router, first_seconds, fit_seconds = run_bank(
            Path(folder), base, experts, blocks, mixture, steps, batch
        )
        further = time_further(bank, steps, batch)
    banks = [first_seconds]
    weight = LinearRouter.fit(
        bank, LinearOptions(steps=1, batch=batch, learning_rate=1e-30), SEED
    ).weight.clone()
    weight.requires_grad_(True)
    schedule = draw_batches(bank, steps=steps, batch=batch, seed=SEED)
    models = merge_experts(base, experts)
    parts = []
    for seconds in run_reference(models, bank, weight, schedule, mixture):
        parts.append(seconds)
        if len(parts) in BANK_AGAIN_AFTER and num_blocks <= LARGEST_REPEATED:
            banks.append(run_our_side()[2])
    view = bank.view(slice(0, 32))
    reference = LinearRouter(len(experts), LinearOptions(), {"weight": weight.detach()})
    difference = float((reference.gates(view) - router.gates(view)).abs().max())
    count = len(experts)
    bound = steps * batch * count / (num_blocks * (count + 1))
    bank_seconds = float(np.median(banks))
    reference_seconds = sum(parts)
    ratio = reference_seconds / bank_seconds
    return Row(
        mixture=mixture,
        num_experts=count,
        num_blocks=num_blocks,
        reference_seconds=reference_seconds,
        reference_part_seconds=parts,
        bank_seconds=bank_seconds,
        all_bank_seconds=banks,
        fit_seconds=fit_seconds,
        further_seconds=further,
        ratio=ratio,
        ratio_low=len(parts) * min(parts) / max(banks),
        ratio_high=len(parts) * max(parts) / min(banks),
        bound=bound,
        bound_fraction=ratio / bound,
        further_ratio={name: reference_seconds / seconds for name, seconds in further.items()},
        largest_gate_difference=difference,
    )


def measure_memory(folder: Path, num_experts: int, num_blocks: int, steps: int, batch: int) -> int:
    """Peak resident bytes of a process of its own that builds a bank and fits on it."""
    command = [
        sys.executable, __file__, "--memory-of", str(num_experts), "--adapters", str(folder),
        "--blocks", str(num_blocks), "--steps", str(steps), "--batch", str(batch),
        "--threads", str(torch.get_num_threads()),
    ]  # fmt: skip
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(output.strip().splitlines()[-1])


def print_own_memory(
    folder: Path, num_experts: int, num_blocks: int, steps: int, batch: int
) -> None:
    """What `measure_memory` runs."""
    base = SimpleNamespace(model=build_base(), weights="0" * 64, hidden_size=HIDDEN)
    experts = save_experts(folder, base.model, num_experts)
    with tempfile.TemporaryDirectory() as bank_folder:
        blocks = build_blocks(num_blocks)
        run_bank(Path(bank_folder), base, experts, blocks, "probability", steps, batch)
    # Not ru_maxrss: it starts at the peak of the process that forked this one.
    status = Path("/proc/self/status").read_text()
    print(1024 * int(status.split("VmHWM:")[1].split()[0]))


def print_tables(rows: list[Row], memory: dict[int, int]) -> None:
    console = Console(width=140)
    table = Table(title="Time to a fused linear router, seconds")
    columns = (
        "mixture", "E", "N_cal", "reference", "bank + fit", "fit", "ratio", "spread", "bound",
        "of bound", "further linear", "further evidence", "gates differ by",
    )  # fmt: skip
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        linear, evidence = row.further_ratio.values()
        table.add_row(
            row.mixture, str(row.num_experts), str(row.num_blocks),
            f"{row.reference_seconds:.2f}", f"{row.bank_seconds:.2f}", f"{row.fit_seconds:.2f}",
            f"{row.ratio:.2f}x", f"{row.ratio_low:.2f}-{row.ratio_high:.2f}",
            f"{row.bound:.2f}x", f"{100 * row.bound_fraction:.0f} %",
            f"{linear:.0f}x", f"{evidence:.0f}x", f"{row.largest_gate_difference:.0e}",
        )  # fmt: skip
    console.print(table)
    if memory:
        text = ", ".join(f"E={count}: {size / 2**20:.0f} MiB" for count, size in memory.items())
        console.print(f"Peak resident memory of bank + fit: {text}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a fifth of steps and data, E = 2")
    parser.add_argument("--mixture", choices=("probability", "logit"), default="probability")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both sides")
    parser.add_argument("--batch", type=int, default=4, help="blocks per step and per pass")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, help="docs/results/fuse_bench_MIXTURE.json")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--adapters", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print_own_memory(
            arguments.adapters,
            arguments.memory_of,
            arguments.blocks,
            arguments.steps,
            arguments.batch,
        )
        return
    steps = 100 if arguments.quick else arguments.steps
    sizes = (60, 120, 400) if arguments.quick else (300, 600, 2000)
    counts = (2,) if arguments.quick else (2, 4, 8)
    base = SimpleNamespace(model=build_base(), weights="0" * 64, hidden_size=HIDDEN)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        experts = save_experts(Path(folder), base.model, max(counts))
        # Once before anything is timed: first calls load code and pages.
        compare(base, experts[:2], 8, "probability", 2, arguments.batch)
        mixture: Mixture = arguments.mixture
        for count in counts:
            for size in sizes:
                rows.append(compare(base, experts[:count], size, mixture, steps, arguments.batch))
                print_tables(rows[-1:], {})
        memory = {
            count: measure_memory(Path(folder), count, sizes[0], steps, arguments.batch)
            for count in (2, 4, 8)
        }
    print_tables(rows, memory)
    if not arguments.quick:
        write_json(
            arguments.out or Path(f"docs/results/fuse_bench_{mixture}.json"),
            {
                "command": "python bench/fuse.py " + " ".join(sys.argv[1:]),
                "steps": steps,
                "batch": arguments.batch,
                "block_size": BLOCK_SIZE,
                "threads": arguments.threads,
                "cores": os.cpu_count(),
                "machine": platform.machine(),
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
                "parameters": sum(p.numel() for p in base.model.parameters()),
                "rows": [asdict(row) for row in rows],
                "peak_resident_bytes": {str(count): size for count, size in memory.items()},
            },
        )


if __name__ == "__main__":
    main()
