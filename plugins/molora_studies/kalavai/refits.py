"""Routers of a finished fusion, fitted again from many seeds: how often one loses a domain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from molora_fed.bank import CalibrationBank, HeldOutBank
from molora_fed.charter import CorpusRules, FusionRules
from molora_fed.corpus.documents import open_domain
from molora_fed.corpus.prepare import prepare_corpus
from molora_fed.evaluation.evaluate import compute_domain_losses, compute_router_losses
from molora_fed.fusion.collapse import choose_published, fit_guarded
from molora_fed.plugins import get_plugins
from molora_fed.routing.contract import OutputRouter, RouterOptions
from molora_fed.types import Reading
from molora_studies.framework.actions import open_base
from molora_studies.framework.contract import Task, TaskContext
from molora_studies.framework.fusions import open_fusion
from molora_studies.kalavai.languages import LOST_NATS

__all__ = ["Banks", "plan_refits", "prepare_part", "refit", "refit_routers"]

_RESTARTS = 3


def plan_refits(
    name: str, fusion: Task, seeds: Sequence[int], *, guarded: Sequence[str], seconds: float
) -> Task:
    """Fit every router of a fusion from other seeds; the fusion's bank is read again.

    The result holds `routers`: by label `is_seeded` and `fits`, for each seed `seed`, `excess`
    (held-out loss above the best expert's by domain, nats), `gap` (equal-weight loss above the
    domain oracle's), `misrouted` (domains whose largest mean gate goes to an expert that loses
    the domain by itself) and, for some routers, `guarded`, the same of what the collapse guard
    publishes, with `attempts` and `replaced` (by the charter's last resort).

    Args:
        name: For people.
        fusion: From `plan_fusion`.
        seeds: Of the routers' fits.
        guarded: Labels of routers that are fitted under the guard, too.
        seconds: Estimate.
    """
    return Task(
        name=name,
        action="refit-routers",
        settings={"seeds": list(seeds), "guarded": list(guarded), "lost_nats": LOST_NATS},
        needs=(fusion, *fusion.needs),
        seconds=seconds,
    )


def prepare_part(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Prepare a part of a domain under a name of its own into `corpus/`."""
    corpus = prepare_corpus(
        settings["domain"],
        open_domain(settings["of"], get_plugins())(),
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
        results[label] = refit(
            Banks(bank, held_out, settings["lost_nats"]),
            (router, options),
            settings["seeds"],
            guarded=label in settings["guarded"],
        )
        if context.progress is not None:
            context.progress(number + 1, len(routers), router=label)
    return {"domains": list(held_out.domains), "routers": results}


@dataclass(frozen=True, eq=False)
class Banks:
    """What routers are fitted and measured on.

    Attributes:
        calibration: Routers are fitted on it.
        held_out: Their losses are measured on it.
        lost_nats: A domain this far above its best expert's loss is lost.
    """

    calibration: CalibrationBank
    held_out: HeldOutBank
    lost_nats: float

    @cached_property
    def losses(self) -> NDArray[np.float64]:
        """Held-out loss of every expert by domain, (domains, E)."""
        bank = self.held_out
        tables = [compute_domain_losses(bank, bank.expert_nll(e)) for e in range(bank.num_experts)]
        return np.array([[table[domain] for table in tables] for domain in bank.domains])

    def measure(self, router: OutputRouter) -> dict[str, Any]:
        """`excess`, `gap` and `misrouted` of a router; see `plan_refits`."""
        found = compute_router_losses(self.held_out, router)
        losses = compute_domain_losses(self.held_out, found.nll)
        best = self.losses.min(axis=1)
        excess = {d: losses[d] - float(nats) for d, nats in zip(losses, best, strict=True)}
        chosen = np.take_along_axis(self.losses, found.gates.argmax(axis=1)[:, None], axis=1)
        is_misrouted = chosen[:, 0] - best > self.lost_nats
        return {
            "excess": excess,
            "gap": sum(excess.values()) / len(excess),
            "misrouted": [d for d, wrong in zip(losses, is_misrouted, strict=True) if wrong],
        }


def refit(
    banks: Banks,
    choice: tuple[type[OutputRouter], RouterOptions],
    seeds: Sequence[int],
    *,
    guarded: bool,
) -> dict[str, Any]:
    """Fit one router from every seed.

    Args:
        banks: What it is fitted and measured on.
        choice: Its class and options.
        seeds: Of the fits; a router that two seeds leave the same is not fitted again.
        guarded: Whether it is also fitted under the collapse guard.

    Returns:
        As `plan_refits` says.
    """
    fits: list[dict[str, Any]] = []
    before: OutputRouter | None = None
    for seed in seeds:
        router, record = _fit_once(banks, choice, seed, guarded)
        if before is not None and _equal(before, router):
            return {"is_seeded": False, "fits": [{**fits[0], "seed": each} for each in seeds]}
        before = router
        fits.append(record)
    return {"is_seeded": True, "fits": fits}


def _fit_once(
    banks: Banks, choice: tuple[type[OutputRouter], RouterOptions], seed: int, guarded: bool
) -> tuple[OutputRouter, dict[str, Any]]:
    """The unguarded fit from a seed, and its record."""
    router, options = choice
    if not guarded:
        fitted = router.fit(banks.calibration, options, seed)
        return fitted, {"seed": seed, **banks.measure(fitted)}
    fit = partial(fit_guarded, collapse_nats=banks.lost_nats, restarts=_RESTARTS)
    found = fit(router, banks.calibration, options, seed)
    # The guard drops its first fit where it finds a better one; that fit is the unguarded one.
    first = found.router if found.kept == 0 else router.fit(banks.calibration, options, seed)
    measured = banks.measure(first)
    last = {"chosen": found}
    if found.collapsed:
        resort, plain = _last_resort()
        last["fallback"] = fit(resort, banks.calibration, plain, seed)
    published = choose_published(last, "chosen", "fallback")
    kept = measured if last[published].router is first else banks.measure(last[published].router)
    guarded_record = {
        **kept,
        "attempts": len(found.attempts),
        "replaced": published == "fallback",
    }
    return first, {"seed": seed, **measured, "guarded": guarded_record}


def _last_resort() -> tuple[type[OutputRouter], RouterOptions]:
    """What a charter publishes where its router collapses, by default."""
    router = get_plugins().routers.resolve(FusionRules().fallback)
    return router, router.Options()


def _equal(one: OutputRouter, other: OutputRouter) -> bool:
    first, second = one.state_tensors(), other.state_tensors()
    return all(torch.equal(first[name], second[name]) for name in first)
