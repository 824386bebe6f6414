"""Routers of a finished fusion, fitted again from many seeds: how often one loses a domain."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from molora_fed.bank import CalibrationBank, HeldOutBank
from molora_fed.charter import CorpusRules
from molora_fed.corpus.prepare import prepare_corpus
from molora_fed.evaluation import compute_domain_losses, compute_router_losses
from molora_fed.plugins import get_plugins
from molora_fed.routing.contract import OutputRouter, RouterOptions
from molora_fed.routing.guard import GuardedRouter, fit_guarded
from molora_fed.studies.actions import open_base
from molora_fed.studies.contract import Task, TaskContext
from molora_fed.studies.fusions import open_fusion
from molora_fed.types import Reading

__all__ = ["plan_refits", "prepare_part", "refit", "refit_routers"]


def plan_refits(name: str, fusion: Task, seeds: Sequence[int], *, seconds: float) -> Task:
    """Fit every router of a fusion from other seeds; the fusion's bank is read again.

    The result holds `routers`: by label `is_seeded` and `fits`, for each seed `seed`, `excess`
    (held-out loss above the best expert's by domain, nats), `gap` (equal-weight loss above the
    domain oracle's) and `guarded`, the same of what the collapse guard keeps, with `attempts`.

    Args:
        name: For people.
        fusion: From `plan_fusion`.
        seeds: Of the routers' fits.
        seconds: Estimate.
    """
    return Task(
        name=name,
        action="molora_kalavai.studies.refits:refit_routers",
        settings={"seeds": list(seeds)},
        needs=(fusion, *fusion.needs),
        seconds=seconds,
    )


def prepare_part(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Prepare a part of a domain under a name of its own into `corpus/`."""
    corpus = prepare_corpus(
        settings["domain"],
        get_plugins().domains.resolve(settings["of"])(),
        open_base(context.needs[0]).tokenizer,
        rules=CorpusRules(block_size=settings["block_size"]),
        folder=context.folder / "corpus",
        shard=(settings["shard"][0], settings["shard"][1]),
        progress=context.progress,
    )
    return corpus.report.to_json()


def refit_routers(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Fit a fusion's routers from every seed; see `plan_refits`."""
    done = context.needs[0]
    # The fusion kept every column its routers read: nothing is added to its folder here.
    fusion = open_fusion(done.task.settings, context.needs[1:], done.folder)
    routers = fusion.choose_routers()
    readings: frozenset[Reading] = frozenset().union(
        {"evidence"}, *(router.reads(options) for router, options in routers.values())
    )
    bank = fusion.build_calibration_bank(readings)
    held_out = fusion.build_held_out_bank(readings)
    results = {}
    for number, (label, (router, options)) in enumerate(routers.items()):
        results[label] = refit(bank, held_out, router, options, settings["seeds"])
        if context.progress is not None:
            context.progress(number + 1, len(routers), router=label)
    return {"domains": list(held_out.domains), "routers": results}


def refit(
    bank: CalibrationBank,
    held_out: HeldOutBank,
    router: type[OutputRouter],
    options: RouterOptions,
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Fit one router from every seed, with and without the guard.

    Args:
        bank: It is fitted on.
        held_out: Its losses are measured on.
        router: Its class.
        options: Its options.
        seeds: Of the fits; a router that two seeds leave the same is not fitted again.

    Returns:
        As `plan_refits` says.
    """
    measure = _Measure(held_out)
    fits: list[dict[str, Any]] = []
    before: OutputRouter | None = None
    is_seeded = True
    for seed in seeds:
        if not is_seeded:
            fits.append({**fits[0], "seed": seed})
            continue
        guarded = fit_guarded(router, bank, options, seed)
        plain = _refit_first(guarded, bank, options, seed)
        if before is not None and _equal(before, plain):
            is_seeded = False
        before = plain
        found = measure(plain)
        kept = found if guarded.kept == 0 else measure(guarded.router)
        kept = {**kept, "attempts": len(guarded.attempts)}
        fits.append({"seed": seed, **found, "guarded": kept})
    return {"is_seeded": is_seeded, "fits": fits}


def _refit_first(
    guarded: GuardedRouter[OutputRouter], bank: CalibrationBank, options: RouterOptions, seed: int
) -> OutputRouter:
    """The guard's first fit, which it did not keep if it found a better one."""
    if guarded.kept == 0:
        return guarded.router
    return type(guarded.router).fit(bank, options, seed)


def _equal(one: OutputRouter, other: OutputRouter) -> bool:
    first, second = one.state_tensors(), other.state_tensors()
    return all(torch.equal(first[name], second[name]) for name in first)


class _Measure:
    """Held-out losses of a router against the best expert of each domain."""

    def __init__(self, held_out: HeldOutBank) -> None:
        tables = [
            compute_domain_losses(held_out, held_out.expert_nll(expert))
            for expert in range(held_out.num_experts)
        ]
        self.held_out = held_out
        self.best = {d: min(table[d] for table in tables) for d in held_out.domains}

    def __call__(self, router: OutputRouter) -> dict[str, Any]:
        nll = compute_router_losses(self.held_out, router).nll
        losses = compute_domain_losses(self.held_out, nll)
        excess = {domain: losses[domain] - self.best[domain] for domain in self.best}
        return {"excess": excess, "gap": sum(excess.values()) / len(excess)}
