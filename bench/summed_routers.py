"""Routers fitted by sums beside the same routers fitted on pooled text, on the demo's cooperative.

    molora demo                                  # makes its folder, `demo`
    python bench/summed_routers.py demo          # a line a router
    python bench/summed_routers.py demo --local  # and federated averaging with local steps
    python bench/summed_routers.py demo --bits   # and sums in fixed point

Every member has its own domain's calibration blocks. Losses are equal-weight means over domains in
nats, calibration and held-out; "numbers" is what a member answers with in all rounds together, and
seconds are processor time of one thread, of all members together.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from molora_kalavai.hidden import HiddenOptions
from molora_kalavai.linear import LinearOptions, LinearRouter

from molora_fed.adapters.files import load_adapter
from molora_fed.bank import (
    Bank,
    CalibrationBank,
    Expert,
    HeldOutBank,
    build_calibration_bank,
    build_held_out_bank,
)
from molora_fed.contributions.contributed import collect_contributed
from molora_fed.contributions.manifest import load_contribution
from molora_fed.errors import RoutingError
from molora_fed.evaluation.evaluate import compute_domain_losses, compute_router_losses
from molora_fed.models.base import load_base
from molora_fed.plugins import get_plugins
from molora_fed.routing.contract import OutputRouter
from molora_fed.routing.fitting import draw_batches
from molora_fed.routing.summed_run import Vector, add_plainly, fit_by_sums
from molora_fed.testing import take_blocks
from molora_fed.types import BASE_EXPERT, Reading

SEEDS = (0, 1)
LOCAL_STEPS = (1, 4, 16)
LOCAL_REACHES = (1.0, 4.0)
LOCAL_ROUNDS = 12
SERVER_MOMENTUM = 0.5
ROUNDED = ("evidence", "statistics", "linear")
BITS = (20, 24, 28, 32, 40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder of `molora demo`")
    parser.add_argument("--local", action="store_true", help="try local steps, too")
    parser.add_argument("--bits", action="store_true", help="round sums to steps, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bank, held_out = build_banks(arguments.demo, Path(folder))
        members = [
            take_blocks(bank, np.flatnonzero(bank.domain_of == d)) for d in range(len(bank.domains))
        ]
        print(
            f"{bank.num_blocks} calibration blocks of {bank.block_size} tokens, D = "
            f"{bank.hidden_size}, {bank.num_experts} experts, {len(members)} members\n\n"
            "| router | seed | calibration, pooled | difference | held-out, pooled | difference "
            "| rounds | numbers | seconds, pooled | seconds |\n" + 10 * "|---" + "|"
        )
        routers = get_plugins().routers
        for name in routers.names():
            router: type[OutputRouter] = routers.resolve(name)
            options = router.Options()
            for seed in SEEDS if isinstance(options, HiddenOptions) else SEEDS[:1]:
                print(compare(name, router, seed, bank, held_out, members), flush=True)
        if arguments.bits:
            for name, bits in itertools.product(ROUNDED, BITS):
                print(compare_rounded(name, bits, held_out, members), flush=True)
        if arguments.local:
            for steps, reach in itertools.product(LOCAL_STEPS, LOCAL_REACHES):
                print(average_locally(steps, reach, members, bank, held_out), flush=True)


def build_banks(demo: Path, folder: Path) -> tuple[CalibrationBank, HeldOutBank]:
    """Both banks of the demo's base, its specialists and the blocks they came with."""
    base = load_base(demo / "cooperative" / "base")
    found = sorted((demo / "contributors").glob("*/contribution"))
    contributed = sorted(
        (collect_contributed(load_contribution(each)) for each in found), key=lambda one: one.id
    )

    def load(one: Any) -> Any:
        return load_adapter(
            one.adapter, model=base.model, plugins=get_plugins(), name=one.contributor
        )

    experts = [
        Expert(BASE_EXPERT, None),
        *(Expert(c.contributor, partial(load, c)) for c in contributed),
    ]
    readings: frozenset[Reading] = frozenset({"evidence", "mean_hidden", "base_hidden"})
    pooled = [one.calibration for one in contributed if one.calibration is not None]
    held_out = [one.held_out for one in contributed]
    return (
        build_calibration_bank(folder, base, experts, pooled, readings=readings),
        build_held_out_bank(folder, base, experts, held_out, readings=readings),
    )


def compute_loss(bank: Bank, router: OutputRouter) -> float:
    losses = compute_domain_losses(bank, compute_router_losses(bank, router).nll)
    return sum(losses.values()) / len(losses)


def compare(
    name: str,
    router: type[OutputRouter],
    seed: int,
    bank: CalibrationBank,
    held_out: HeldOutBank,
    members: list[CalibrationBank],
) -> str:
    """A row of the table."""
    options, start = router.Options(), time.process_time()
    pooled = router.fit(replace(bank, _derived={}), options, seed)
    between = time.process_time()
    fresh = [replace(member, _derived={}) for member in members]
    try:
        found, result = fit_by_sums(router, fresh, options, seed)
    except RoutingError as error:
        return f"| {name} | {seed} | {str(error).partition(':')[0]} |"
    spent = time.process_time() - between
    cells = []
    for each in (bank, held_out):
        before, after = compute_loss(each, pooled), compute_loss(each, found)
        cells.append(f"{before:.5f} | {after - before:+.5f}")
    return (
        f"| {name} | {seed} | {' | '.join(cells)} | {result.rounds} | {result.answer_numbers} "
        f"| {between - start:.2f} | {spent:.2f} |"
    )


def compare_rounded(
    name: str, bits: int, held_out: HeldOutBank, members: list[CalibrationBank]
) -> str:
    """What rounding every member's numbers to a step below their bounds costs."""
    router = get_plugins().routers.resolve(name)

    def add(vectors: Sequence[Vector], bounds: Vector) -> Vector:
        steps = np.sum([np.round(vector / bounds * 2.0**bits) for vector in vectors], axis=0)
        return np.asarray(steps * bounds / 2.0**bits)

    exact, rounded = (
        fit_by_sums(router, members, router.Options(), SEEDS[0], add=how)[0]
        for how in (add_plainly, add)
    )
    difference = compute_loss(held_out, rounded) - compute_loss(held_out, exact)
    return f"{name}, rounded to 2^-{bits} of the bounds: held-out {difference:+.5f}"


def average_locally(
    steps: int,
    reach: float,
    members: list[CalibrationBank],
    bank: CalibrationBank,
    held_out: HeldOutBank,
) -> str:
    """Federated averaging of `linear` with momentum, each member making some AdamW steps a round.

    The rate is such that all local steps of a run go `reach` times as far as the pooled fit's may.
    """
    options = LinearOptions()
    rate = reach * options.learning_rate * options.steps / (steps * LOCAL_ROUNDS)
    start = LinearRouter.draw(bank.expert_names, bank.hidden_size, options, SEEDS[0])
    weight = start.weight.detach().clone()
    velocity = torch.zeros_like(weight)
    for number in range(LOCAL_ROUNDS):
        moved = []
        for member in members:
            own = weight.clone().requires_grad_(True)
            optimizer = torch.optim.AdamW([own], lr=rate, fused=True)
            features = LinearRouter.derive_pooled(member, options)
            for rows in draw_batches(member, steps=steps, batch=options.batch, seed=number):
                loss = member.score_nll(features[rows] @ own.T, rows).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            moved.append(own.detach() - weight)
        velocity = SERVER_MOMENTUM * velocity + torch.stack(moved).mean(dim=0)
        weight = weight + velocity
    router = LinearRouter(bank.num_experts, options, {"weight": weight})
    losses = [compute_loss(each, router) for each in (bank, held_out)]
    return (
        f"linear, {steps} local steps, reach {reach}, {LOCAL_ROUNDS} rounds: "
        f"calibration {losses[0]:.5f}, held-out {losses[1]:.5f}"
    )


if __name__ == "__main__":
    main()
