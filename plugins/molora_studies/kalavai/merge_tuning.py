"""TIES and DARE, density and scale chosen on calibration text in as many tries as routers had."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.updates import Adapter
from molora_fed.bank import Bank
from molora_fed.evaluation.bootstrap import ClusterIndex
from molora_fed.evaluation.evaluate import compute_domain_losses
from molora_fed.models.base import Base
from molora_fed.models.forward import compute_block_losses
from molora_fed.models.runtime import limit_threads
from molora_fed.plugins import get_plugins
from molora_fed.storage.options import open_callable
from molora_fed.types import Reading
from molora_studies.framework.contract import Claim, Table, Task, TaskContext
from molora_studies.framework.fusions import load_evaluation, open_fusion
from molora_studies.kalavai.comparisons import Replicated
from molora_studies.verdicts import judge_below

__all__ = ["TRIES", "claim_merges", "plan_tuned_merges", "tabulate_merges", "tune_merges"]

TRIES: Mapping[str, tuple[Mapping[str, float], ...]] = {
    "ties": tuple({"density": d, "scale": s} for d in (0.2, 0.5) for s in (0.3, 0.6, 1.0)),
    "dare": tuple({"density": d, "scale": s} for d in (0.5, 0.9) for s in (1.0, 1.5, 2.5)),
    "dare-ties": tuple({"density": d, "scale": s} for d in (0.5, 0.9) for s in (0.3, 0.6, 1.0)),
}
"""Six tries of each merge, as many as the study `routers` has evidence routers; the first of a
scale of 1 is the merge as registered."""

ROUTER = "fused:evidence"
_READINGS: frozenset[Reading] = frozenset({"evidence"})
_BLOCKS_A_SECOND = 150  # of one model on one quiet core at D = 128, T = 128


def plan_tuned_merges(name: str, fusion: Task, *, blocks: int | None = None) -> Task:
    """Choose every merge's settings on a fusion's calibration blocks, then measure it once.

    The result holds `merges`: by name `tries` (settings and equal-weight calibration loss, nats),
    `chosen` (settings), `loss` (equal-weight, held out) and `difference`, the loss of the fusion by
    `evidence` less the merge's, with `low` and `high` by document cluster.

    Args:
        name: For people.
        fusion: From `plan_fusion`, with a router labelled `evidence`.
        blocks: Calibration blocks of each domain that tries are measured on; None takes all.
    """
    settings = fusion.settings["fusion"]
    domains = len(fusion.settings["members"])
    tried = settings["calibration"] if blocks is None else blocks
    passes = domains * (tried * sum(map(len, TRIES.values())) + settings["held_out"] * len(TRIES))
    tries = {merge: [dict(one) for one in tries] for merge, tries in TRIES.items()}
    return Task(
        name=name,
        action=f"{__name__}:tune_merges",
        # Left out where usual: keys of tasks from before there was a choice do not know of it.
        settings={"tries": tries} | ({} if blocks is None else {"blocks": blocks}),
        needs=(fusion, *fusion.needs),
        seconds=20 + passes / _BLOCKS_A_SECOND,
    )


def tune_merges(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Tune merges and measure them; see `plan_tuned_merges`."""
    done = context.needs[0]
    # The fusion kept every column of its banks: nothing is added to its folder here.
    fusion = open_fusion(done.task.settings, context.needs[1:], done.folder)
    calibration = fusion.build_calibration_bank(_READINGS)
    held_out = fusion.build_held_out_bank(_READINGS)
    index = ClusterIndex.build(held_out.clusters, held_out.domain_of)
    evaluation, adapters = load_evaluation(done.folder), fusion.load_adapters()
    rows = _choose_rows(calibration, settings.get("blocks"))
    registry, found = get_plugins().merges, {}
    with limit_threads(context.threads):
        for number, (name, tries) in enumerate(settings["tries"].items()):

            def build(chosen: Mapping[str, float], name: str = name) -> Adapter:
                merge = open_callable(registry, name, chosen)
                made: Adapter = merge(adapters, name=name, seed=fusion.settings.seed)
                return made

            losses = [_measure(fusion.base, calibration, build(one), rows) for one in tries]
            chosen = tries[losses.index(min(losses))]
            with applied(fusion.base.model, build(chosen)) as model:
                sums = index.sum(compute_block_losses(model, held_out.tokens).numpy())
            label = f"tuned-{name}"
            own = replace(evaluation, clusters=index, sums={**evaluation.sums, label: sums})
            found[name] = {
                "tries": [{**one, "loss": loss} for one, loss in zip(tries, losses, strict=True)],
                "chosen": dict(chosen),
                "loss": own.equal_weight(label),
                "difference": own.difference(ROUTER, label),
            }
            if context.progress is not None:
                context.progress(number + 1, len(settings["tries"]), merge=name)
    return {"merges": found}


def _choose_rows(bank: Bank, count: int | None) -> NDArray[np.int64]:
    """Places of the first blocks of each domain, in the bank's order."""
    own = [np.flatnonzero(bank.domain_of == number) for number in range(len(bank.domains))]
    return np.concatenate([places[:count] for places in own])


def _measure(base: Base, bank: Bank, adapter: Adapter, rows: NDArray[np.int64]) -> float:
    """Equal-weight loss of the base with an adapter on rows of a bank, nats."""
    with applied(base.model, adapter) as model:
        by_domain = compute_domain_losses(
            bank, compute_block_losses(model, bank.tokens[rows]), rows
        )
    return sum(by_domain.values()) / len(by_domain)


def claim_merges(results: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Our fusion against each tuned merge.

    Args:
        results: Of `tune_merges`, one a seed.
    """
    claims = []
    for name in results[0]["merges"]:
        found = Replicated.of_seeds([result["merges"][name]["difference"] for result in results])
        tries = len(results[0]["merges"][name]["tries"])
        claims.append(
            Claim(
                f"Our fusion beats `{name}` with tuned density and scale",
                "ours",
                f"evidence - {name}: {found.show('nats', 4)}",
                judge_below(found.spans),
                found.unit,
                f"the best of {tries} tries by calibration loss at every seed; by the sign of all "
                "intervals",
            )
        )
    return claims


def tabulate_merges(results: Sequence[Mapping[str, Any]]) -> Table:
    """Settings chosen and losses, by merge and seed.

    Args:
        results: Of `tune_merges`, one a seed.
    """
    rows = []
    for name in results[0]["merges"]:
        own = [result["merges"][name] for result in results]
        chosen = "; ".join(
            f"density {one['chosen']['density']:g}, scale {one['chosen']['scale']:g}" for one in own
        )
        losses = ", ".join(f"{one['loss']:.3f}" for one in own)
        rows.append((name, str(len(own[0]["tries"])), chosen, losses))
    return Table(
        "Merges with density and scale chosen on calibration text, by seed",
        ("merge", "tries", "chosen", "held-out loss, nats"),
        rows,
    )
