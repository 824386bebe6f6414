"""A population's one pass with its router on, against PEFT with all adapters active in one pass.

    python bench/population.py --clock cpu --threads 1 --out docs/results/population_bench.json
    python bench/population.py --quick    # P = 2 and 8, few rounds

The whole takes P = 2, 4, 8, 16 at batch 8 x 128 and 1 x 1: two minutes of a quiet core.

The base has the built-in base's size; its weights and the slots' factors are random, which changes
no timing. In every round each side runs once, one after the other in one process with the same
threads, so that all meet the same neighbours (at 1 x 1 five times, of which the fastest counts); a
figure is the median over rounds, a spread the 10th to 90th percentile of the ratios within a round.
All slots change all linear layers. Where more programs run than there are cores, `--clock cpu`
reads the process's own seconds; by the wall a short call then counts its neighbours' turns, too.

The rival is one PEFT pass with all adapters active: one output, as ours, but every adapter whole,
without gates. One PEFT pass a slot gives P outputs; switches between slots are not counted. Ours is
the evolved model as it is opened for inference, whose output are log-probabilities: with the router
`parallel-sigmoid` on the base's states (so that the base's layers run first, without the output
head), on its token embeddings, or with its gates given. Beside it is the form that trains, hooks on
the base's own layers.

work = multiplications of ours, router on states, over those of PEFT's one pass; above 1 at any P:
the base runs first. Ours is checked on logits against PEFT, slot by slot and with all gates at
1 against all adapters active, and with the router on against the form that trains.
"""

import argparse
import copy
import math
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from molora_evolution.routers import ParallelSigmoidRouter
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from molora_fed.adapters.save import save_adapter
from molora_fed.bank.views import GateView
from molora_fed.inference.fused_build import build_causal_lm
from molora_fed.inference.fused_lm import FusedForCausalLM
from molora_fed.models.base import Base
from molora_fed.models.layout import adaptable_modules, weight_of
from molora_fed.population.bundle import EvolvedModel
from molora_fed.population.contract import Population
from molora_fed.population.mixture import Mixture
from molora_fed.population.slots import make_population, slot_adapter
from molora_fed.storage.files import write_json
from molora_fed.testing.models import build_random_adapter
from molora_fed.training.builtin_base import BuiltinBaseConfig

SIZES = ((8, 128), (1, 1))
COUNTS = (2, 4, 8, 16)
SHORT_CALLS = 5  # of a side in one round at 1 x 1, where any interruption outlasts a call
SEED = 42
BUILTIN = BuiltinBaseConfig()
ROUTER = "parallel-sigmoid"

ONE_PASS = "PEFT, all adapters in one pass, no gates"
SLOT_BY_SLOT = "PEFT, one pass a slot"
BASE = "base"
OURS = "ours, router on states"
OURS_EMBEDDINGS = "ours, router on embeddings"
OURS_GIVEN = "ours, gates given"
TRAINING = "training form, router on states"
TRAINING_GIVEN = "training form, gates given"
MIXTURES = (OURS, OURS_EMBEDDINGS, OURS_GIVEN, TRAINING, TRAINING_GIVEN)

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Ratio:
    """A ratio of two sides: median and spread over rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        milliseconds: By side, medians over rounds.
        one_pass: Time of PEFT with all adapters in one pass over that of each mixture.
        slot_by_slot: Time of one PEFT pass a slot over that of each mixture.
        to_base: Time of each mixture over the base's.
        work: Multiplications of ours, router on states, over those of PEFT's one pass.
        largest_difference: Of log-probabilities, ours against PEFT and the form that trains.
    """

    num_slots: int
    rank: int
    batch: int
    tokens: int
    milliseconds: dict[str, float]
    one_pass: dict[str, Ratio]
    slot_by_slot: dict[str, Ratio]
    to_base: dict[str, Ratio]
    work: float
    largest_difference: float


def build_base() -> Base:
    """A random GPT-NeoX of the built-in base's size."""
    torch.manual_seed(SEED)
    config = GPTNeoXConfig(
        vocab_size=BUILTIN.vocab_size,
        hidden_size=BUILTIN.hidden,
        num_hidden_layers=BUILTIN.layers,
        num_attention_heads=BUILTIN.heads,
        intermediate_size=4 * BUILTIN.hidden,
        max_position_embeddings=BUILTIN.block_size,
    )
    model = GPTNeoXForCausalLM(config).eval().requires_grad_(False)
    tokenizer, nothing = SimpleNamespace(eos_token_id=0), "0" * 64
    return Base(Path(), model, tokenizer, nothing, nothing, nothing, {}, "random", "", None)


def build_population(base: Base, num_slots: int, rank: int) -> Population:
    """Random slots of one rank on all linear layers."""
    adapters = [build_random_adapter(base.model, rank=rank, seed=s) for s in range(num_slots)]
    named = [(adapter.name, None, adapter) for adapter in adapters]
    return make_population(base, named, num_slots=num_slots)


def build_peft(model: Any, population: Population) -> Any:
    """The same slots in PEFT, on a copy of the model."""
    own = copy.deepcopy(model)
    wrapped: Any = None
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5 for an attribute by its old name.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        for slot in range(population.num_slots):
            folder = Path(root) / str(slot)
            save_adapter(slot_adapter(population, slot), model, folder)
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(own, str(folder), adapter_name=f"slot-{slot}")
            else:
                wrapped.load_adapter(str(folder), adapter_name=f"slot-{slot}")
    return wrapped.eval()


class Sides:
    """What is timed, on one batch of tokens; every side returns its seconds.

    Attributes:
        timed: Sides by name.
    """

    def __init__(
        self, base: Base, population: Population, batch: int, tokens: int, clock: Clock
    ) -> None:
        self.model = base.model
        self.clock = clock
        self.num_slots = population.num_slots
        self.mixture = Mixture(self.model, population)
        self.peft = build_peft(self.model, population)
        generator = torch.Generator().manual_seed(SEED)
        shape = (batch, tokens)
        self.tokens = torch.randint(0, BUILTIN.vocab_size, shape, generator=generator)
        self.starts = torch.zeros(shape, dtype=torch.bool)
        self.starts[:, 0] = True
        self.gates = torch.rand(batch, self.num_slots, generator=generator)
        self.router = self._build_router(base, "base_hidden")
        on_embeddings = self._build_router(base, "embeddings")
        self.ours, self.ours_on_embeddings = (
            build_causal_lm(EvolvedModel(base, population, router, ROUTER)).eval()
            for router in (self.router, on_embeddings)
        )
        self.calls = SHORT_CALLS if batch * tokens == 1 else 1
        sides: dict[str, Callable[[], Tensor]] = {
            BASE: self.run_base,
            OURS: lambda: self.run_ours(self.ours),
            OURS_EMBEDDINGS: lambda: self.run_ours(self.ours_on_embeddings),
            OURS_GIVEN: lambda: self.run_ours(self.ours, self.gates),
            TRAINING: self.run_training_form,
            TRAINING_GIVEN: lambda: self.run_mixture(self.spread_gates()),
        }
        self.timed: dict[str, Callable[[], float]] = {
            ONE_PASS: self.time_one_pass,
            SLOT_BY_SLOT: self.time_slot_by_slot,
            **{name: (lambda run=run: self.measure(run)) for name, run in sides.items()},
        }

    def _build_router(self, base: Base, reading: str) -> ParallelSigmoidRouter:
        options = ParallelSigmoidRouter.Options(input=reading)
        router = ParallelSigmoidRouter.build(self.num_slots, base.hidden_size, options, SEED)
        found: ParallelSigmoidRouter = router.eval()
        return found

    def measure(self, run: Callable[[], Any]) -> float:
        """Seconds of the fastest call of this round."""
        fastest = math.inf
        for _ in range(self.calls):
            start = self.clock()
            run()
            fastest = min(fastest, self.clock() - start)
        return fastest

    def run_base(self) -> Tensor:
        """The model as it is."""
        logits: Tensor = self.model(input_ids=self.tokens, use_cache=False).logits
        return logits

    def run_ours(self, lm: FusedForCausalLM, gates: Tensor | None = None) -> Tensor:
        """The evolved model; its router decides if no gates (B, P) are given."""
        found = lm(self.tokens, use_cache=False, document_starts=self.starts, gates=gates)
        logits: Tensor = found.logits
        return logits

    def spread_gates(self) -> Tensor:
        """The given gates at every token, (B, T, P)."""
        return self.gates[:, None].expand(*self.tokens.shape, self.num_slots)

    def run_mixture(self, gates: Tensor) -> Tensor:
        """One pass of the form that trains."""
        with self.mixture.mixed(gates):
            return self.run_base()

    def run_training_form(self) -> Tensor:
        """Gates from the base's states, then the form that trains."""
        hidden = self.model.base_model(input_ids=self.tokens, use_cache=False).last_hidden_state
        return self.run_mixture(self.router(GateView(self.starts, base_hidden=hidden)))

    def activate_all(self) -> None:
        """Let PEFT add all slots in one pass."""
        names = [f"slot-{slot}" for slot in range(self.num_slots)]
        self.peft.base_model.set_adapter(names, inference_mode=True)

    def run_peft(self) -> Tensor:
        """PEFT with what is active."""
        logits: Tensor = self.peft(input_ids=self.tokens, use_cache=False).logits
        return logits

    def time_one_pass(self) -> float:
        """One pass with all adapters active; activating them is not timed."""
        self.activate_all()
        return self.measure(self.run_peft)

    def time_slot_by_slot(self) -> float:
        """One pass a slot; choosing the slot is not timed."""
        seconds = 0.0
        for slot in range(self.num_slots):
            self.peft.set_adapter(f"slot-{slot}", inference_mode=True)
            seconds += self.measure(self.run_peft)
        return seconds

    def find_largest_difference(self) -> float:
        """Of log-probabilities, between ours and the others."""
        batch = len(self.tokens)
        found = [(self.run_ours(self.ours), self.run_training_form())]
        for slot, one_hot in enumerate(torch.eye(self.num_slots)):
            self.peft.set_adapter(f"slot-{slot}", inference_mode=True)
            found.append((self.run_ours(self.ours, one_hot.expand(batch, -1)), self.run_peft()))
        self.activate_all()
        ones = torch.ones(batch, self.num_slots)
        found.append((self.run_ours(self.ours, ones), self.run_peft()))
        return max(float((ours - other.log_softmax(-1)).abs().max()) for ours, other in found)


def compute_work(model: Any, num_ranks: int, tokens: int) -> float:
    """Multiplications of ours with the router on states over those of PEFT's one pass."""
    shapes = [weight_of(module).shape for module in adaptable_modules(model, 0).values()]
    linear = sum(rows * columns for rows, columns in shapes)
    head: int = model.get_output_embeddings().weight.numel()
    attention = 2 * BUILTIN.layers * BUILTIN.hidden * tokens  # scores, and their mean of values
    low_rank = sum(num_ranks * (rows + columns) for rows, columns in shapes)
    return 1 + (linear + attention) / (linear + attention + head + low_rank)


def compare(
    base: Base, num_slots: int, rank: int, size: tuple[int, int], rounds: int, clock: Clock
) -> Row:
    """Time all sides, once in every round."""
    sides = Sides(base, build_population(base, num_slots, rank), *size, clock)
    difference = sides.find_largest_difference()
    for run in sides.timed.values():
        run()
    seconds = {name: np.empty(rounds) for name in sides.timed}
    for index in range(rounds):
        for name, run in sides.timed.items():
            seconds[name][index] = run()

    def ratio(over: str, under: str) -> Ratio:
        low, median, high = np.quantile(seconds[over] / seconds[under], (0.1, 0.5, 0.9))
        return Ratio(float(median), float(low), float(high))

    return Row(
        num_slots=num_slots,
        rank=rank,
        batch=size[0],
        tokens=size[1],
        milliseconds={name: 1000 * float(np.median(found)) for name, found in seconds.items()},
        one_pass={name: ratio(ONE_PASS, name) for name in MIXTURES},
        slot_by_slot={name: ratio(SLOT_BY_SLOT, name) for name in MIXTURES},
        to_base={name: ratio(name, BASE) for name in MIXTURES},
        work=compute_work(base.model, num_slots * rank, size[1]),
        largest_difference=difference,
    )


def print_table(rows: list[Row]) -> None:
    table = Table(title="PEFT, all adapters in one pass without gates, against a population's pass")
    columns = (
        "P", "batch", "base ms", "PEFT ms", *(f"PEFT / {name}" for name in MIXTURES),
        f"P PEFT passes / {OURS}", f"{OURS} / base", "work", "differs by",
    )  # fmt: skip
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.num_slots), f"{row.batch}x{row.tokens}", f"{row.milliseconds[BASE]:.2f}",
            f"{row.milliseconds[ONE_PASS]:.2f}", *(str(row.one_pass[name]) for name in MIXTURES),
            str(row.slot_by_slot[OURS]), str(row.to_base[OURS]), f"{row.work:.2f}",
            f"{row.largest_difference:.0e}",
        )  # fmt: skip
    Console(width=220).print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="P = 2 and 8, few rounds")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of all sides")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="what is read")
    parser.add_argument("--rank", type=int, default=8, help="R of every slot")
    parser.add_argument("--rounds", type=int, default=20, help="three times as many at 1 x 1")
    parser.add_argument("--out", type=Path, help="docs/results/population_bench.json")
    arguments = parser.parse_args()
    if arguments.clock == "cpu" and arguments.threads != 1:
        parser.error("--clock cpu adds up threads: expected --threads 1 with it")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    clock = CLOCKS[arguments.clock]
    counts, rounds = ((2, 8), 8) if arguments.quick else (COUNTS, arguments.rounds)
    base = build_base()
    rows = []
    with torch.inference_mode():
        for size in SIZES:
            for num_slots in counts:
                many = rounds if size[1] > 1 else 3 * rounds
                rows.append(compare(base, num_slots, arguments.rank, size, many, clock))
    print_table(rows)
    if arguments.out:
        settings = {
            "threads": arguments.threads,
            "clock": arguments.clock,
            "rank": arguments.rank,
            "rounds": rounds,
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
            "torch": torch.__version__,
        }
        write_json(arguments.out, {"settings": settings, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
