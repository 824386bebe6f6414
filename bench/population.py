"""One pass for all slots of a population, against PEFT and the base alone.

    python bench/population.py --clock cpu --threads 1 --out docs/results/population_bench.json
    python bench/population.py --quick    # P = 2 and 8, few rounds

The whole takes P = 2, 4, 8, 16 at batch 8 x 128 and 1 x 1: two minutes of a quiet core.

The base has the built-in base's size; its weights and the slots' factors are random, which changes
no timing. In every round each side runs once, one after the other in one process with the same
threads, so that all meet the same neighbours (at 1 x 1 five times, of which the fastest counts); a
figure is the median over rounds, a spread the 10th to 90th percentile of the ratios within a round.
All slots change all linear layers. Where more programs run than there are cores, `--clock cpu`
reads the process's own seconds; by the wall a short call then counts its neighbours' turns, too.

Sides: the base; the mixture with its gates given; the mixture and the router `parallel-sigmoid`
that makes them, which reads the base's states (so that the base's layers run first, without the
output head) or its token embeddings; one PEFT pass with all adapters active, the strongest rival,
which gives one output as the mixture does but adds every adapter whole, without gates; one PEFT
pass a slot, which gives P outputs, the switches between slots not counted; the
mixture's products alone, outside of the model.

limit = 1 + multiplications of the low-rank products / multiplications of the base. The mixture is
checked against PEFT on logits, slot by slot, and with all gates at 1 against all adapters active.
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
from torch.nn import functional
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from molora_fed.adapters.save import save_adapter
from molora_fed.bank.views import GateView
from molora_fed.models.layout import adaptable_modules, weight_of
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
ONE_PASS = "PEFT, all adapters in one pass, without gates"

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
    """One comparison; milliseconds are medians over rounds."""

    num_slots: int
    rank: int
    batch: int
    tokens: int
    milliseconds: dict[str, float]
    mixture_to_base: Ratio
    with_states_router_to_base: Ratio
    with_embeddings_router_to_base: Ratio
    one_pass_to_mixture: Ratio
    one_pass_to_states_router: Ratio
    one_pass_to_embeddings_router: Ratio
    sequential_to_mixture: Ratio
    sequential_to_states_router: Ratio
    sequential_to_embeddings_router: Ratio
    limit: float
    limit_fraction: float
    products_fraction: float
    largest_difference: float
    one_pass_difference: float


def build_base() -> Any:
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
    return GPTNeoXForCausalLM(config).eval().requires_grad_(False)


def build_population(model: Any, num_slots: int, rank: int) -> Population:
    """Random slots of one rank on all linear layers."""
    base: Any = SimpleNamespace(model=model, weights="0" * 64)
    adapters = [build_random_adapter(model, rank=rank, seed=s) for s in range(num_slots)]
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
        self, model: Any, population: Population, batch: int, tokens: int, clock: Clock
    ) -> None:
        self.model = model
        self.clock = clock
        self.num_slots = population.num_slots
        self.mixture = Mixture(model, population)
        self.peft = build_peft(model, population)
        generator = torch.Generator().manual_seed(SEED)
        shape = (batch, tokens)
        self.tokens = torch.randint(0, BUILTIN.vocab_size, shape, generator=generator)
        self.starts = torch.zeros(shape, dtype=torch.bool)
        self.starts[:, 0] = True
        self.gates = torch.rand(*shape, self.num_slots, generator=generator)
        width = model.config.hidden_size
        self.states_router = self._build_router(width, "base_hidden")
        self.embeddings_router = self._build_router(width, "embeddings")
        self.inputs = {
            weight_of(module).shape[1]: torch.randn(batch * tokens, weight_of(module).shape[1])
            for module in adaptable_modules(model, 0).values()
        }
        self.calls = SHORT_CALLS if batch * tokens == 1 else 1
        self.timed: dict[str, Callable[[], float]] = {
            "base": lambda: self.measure(self.run_base),
            "mixture": lambda: self.measure(lambda: self.run_mixture(self.gates)),
            "mixture and router on states": lambda: self.measure(self.run_with_states),
            "mixture and router on embeddings": lambda: self.measure(self.run_with_embeddings),
            ONE_PASS: self.time_one_pass,
            "PEFT, slot by slot": self.time_sequential,
            "products alone": lambda: self.measure(self.run_products),
        }

    def _build_router(self, width: int, reading: str) -> Any:
        options = ParallelSigmoidRouter.Options(input=reading)
        return ParallelSigmoidRouter.build(self.num_slots, width, options, SEED)

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
        return self.model(input_ids=self.tokens, use_cache=False).logits

    def run_mixture(self, gates: Tensor) -> Tensor:
        """One pass for all slots."""
        with self.mixture.mixed(gates):
            return self.run_base()

    def run_with_states(self) -> Tensor:
        """Gates from the base's states, then the mixture."""
        hidden = self.model.base_model(input_ids=self.tokens, use_cache=False).last_hidden_state
        return self.run_mixture(self.states_router(GateView(self.starts, base_hidden=hidden)))

    def run_with_embeddings(self) -> Tensor:
        """Gates from the token embeddings, then the mixture."""
        embeddings = self.model.get_input_embeddings()(self.tokens)
        view = GateView(self.starts, embeddings=embeddings)
        return self.run_mixture(self.embeddings_router(view))

    def run_products(self) -> None:
        """Both low-rank products of every layer."""
        for layer in self.mixture.layers:
            hidden = functional.linear(self.inputs[layer.a.shape[1]], layer.a)
            functional.linear(hidden, layer.b)

    def activate_all(self) -> None:
        """Let PEFT add all slots in one pass."""
        names = [f"slot-{slot}" for slot in range(self.num_slots)]
        self.peft.base_model.set_adapter(names, inference_mode=True)

    def run_peft(self) -> Tensor:
        """PEFT with what is active."""
        return self.peft(input_ids=self.tokens, use_cache=False).logits

    def time_one_pass(self) -> float:
        """One pass with all adapters active; activating them is not timed."""
        self.activate_all()
        return self.measure(self.run_peft)

    def time_sequential(self) -> float:
        """One pass a slot; choosing the slot is not timed."""
        seconds = 0.0
        for slot in range(self.num_slots):
            self.peft.set_adapter(f"slot-{slot}", inference_mode=True)
            seconds += self.measure(self.run_peft)
        return seconds

    def find_largest_difference(self) -> float:
        """Of logits, mixture with one slot's gate at 1 against PEFT with that adapter."""
        largest = 0.0
        for slot, one_hot in enumerate(torch.eye(self.num_slots)):
            self.peft.set_adapter(f"slot-{slot}", inference_mode=True)
            largest = max(largest, self._compare(self.run_mixture(one_hot)))
        return largest

    def find_one_pass_difference(self) -> float:
        """Of logits, mixture with all gates at 1 against PEFT with all adapters."""
        self.activate_all()
        return self._compare(self.run_mixture(torch.ones(self.num_slots)))

    def _compare(self, found: Tensor) -> float:
        return float((found - self.run_peft()).abs().max())


def compute_limit(model: Any, num_ranks: int, tokens: int) -> float:
    """1 + multiplications per token of the low-rank products over those of the base."""
    shapes = [weight_of(module).shape for module in adaptable_modules(model, 0).values()]
    linear = sum(rows * columns for rows, columns in shapes)
    head = model.get_output_embeddings().weight.numel()
    attention = 2 * BUILTIN.layers * BUILTIN.hidden * tokens  # scores, and their mean of values
    low_rank = sum(num_ranks * (rows + columns) for rows, columns in shapes)
    return 1 + low_rank / (linear + head + attention)


def compare(
    model: Any, num_slots: int, rank: int, size: tuple[int, int], rounds: int, clock: Clock
) -> Row:
    """Time all sides, once in every round."""
    sides = Sides(model, build_population(model, num_slots, rank), *size, clock)
    differences = sides.find_largest_difference(), sides.find_one_pass_difference()
    for run in sides.timed.values():
        run()
    seconds = {name: np.empty(rounds) for name in sides.timed}
    for index in range(rounds):
        for name, run in sides.timed.items():
            seconds[name][index] = run()

    def ratio(over: str, under: str) -> Ratio:
        low, median, high = np.quantile(seconds[over] / seconds[under], (0.1, 0.5, 0.9))
        return Ratio(float(median), float(low), float(high))

    base, mixture, states, embeddings, one_pass, sequential, products = sides.timed
    limit = compute_limit(model, num_slots * rank, size[1])
    to_base = ratio(mixture, base)
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    return Row(
        num_slots=num_slots,
        rank=rank,
        batch=size[0],
        tokens=size[1],
        milliseconds={name: 1000 * value for name, value in median.items()},
        mixture_to_base=to_base,
        with_states_router_to_base=ratio(states, base),
        with_embeddings_router_to_base=ratio(embeddings, base),
        one_pass_to_mixture=ratio(one_pass, mixture),
        one_pass_to_states_router=ratio(one_pass, states),
        one_pass_to_embeddings_router=ratio(one_pass, embeddings),
        sequential_to_mixture=ratio(sequential, mixture),
        sequential_to_states_router=ratio(sequential, states),
        sequential_to_embeddings_router=ratio(sequential, embeddings),
        limit=limit,
        limit_fraction=limit / to_base.median,
        products_fraction=median[products] / (median[mixture] - median[base]),
        largest_difference=differences[0],
        one_pass_difference=differences[1],
    )


def print_table(rows: list[Row]) -> None:
    table = Table(title="One pass for P slots: against the base, and PEFT against it")
    columns = (
        "P", "batch", "base ms", "mixture / base", "with router on states", "on embeddings",
        "PEFT, one pass, no gates / mixture", "with router on states", "P PEFT passes / mixture",
        "with router on states", "limit", "of limit", "products", "differs by",
    )  # fmt: skip
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.num_slots), f"{row.batch}x{row.tokens}", f"{row.milliseconds['base']:.2f}",
            str(row.mixture_to_base), str(row.with_states_router_to_base),
            str(row.with_embeddings_router_to_base), str(row.one_pass_to_mixture),
            str(row.one_pass_to_states_router), str(row.sequential_to_mixture),
            str(row.sequential_to_states_router), f"{row.limit:.2f}x",
            f"{100 * row.limit_fraction:.0f} %", f"{100 * row.products_fraction:.0f} %",
            f"{max(row.largest_difference, row.one_pass_difference):.0e}",
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
    model = build_base()
    rows = []
    with torch.inference_mode():
        for size in SIZES:
            for num_slots in counts:
                many = rounds if size[1] > 1 else 3 * rounds
                rows.append(compare(model, num_slots, arguments.rank, size, many, clock))
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
