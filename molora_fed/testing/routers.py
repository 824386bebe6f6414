"""Conformance checks of routers, on banks of made-up numbers.

`check_router_conformance(MyRouter)` is the whole test a router plugin needs; it proves causality
by changing the future.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from molora_fed.bank import CalibrationBank, HeldOutBank
from molora_fed.bank.views import RouterView
from molora_fed.errors import RoutingError
from molora_fed.evaluation.evaluate import compute_router_losses, evaluate
from molora_fed.models.hidden_statistics import collect_statistics
from molora_fed.routing.contract import OutputRouter, RouterOptions
from molora_fed.routing.probes import (
    find_distribution_fault,
    find_leak,
    same_views,
    step_through,
    take_rows,
)
from molora_fed.routing.published import make_published
from molora_fed.routing.summed import Finished, SummedFit, plan_summed_fit
from molora_fed.routing.summed_run import (
    add_plainly,
    answer_round,
    collect_setting,
    fit_by_sums,
    unpack_sums,
    weigh_domains,
)
from molora_fed.testing.banks import (
    ALL_READINGS,
    build_synthetic_bank,
    permute_experts,
    take_blocks,
)
from molora_fed.testing.findings import (
    CheckResult,
    Remark,
    describe_raised,
    examine,
    refuse_broken,
)
from molora_fed.testing.targets import other_chance
from molora_fed.types import BASE_EXPERT

__all__ = ["check_router_conformance", "examine_router"]

STEP_TOLERANCE = 1e-4
ORDER_TOLERANCE_NATS = 0.02
EQUAL_TOLERANCE_NATS = 0.02
SUM_TOLERANCE = 1e-5  # of the largest number of a tensor of sums
SPLIT_TOLERANCE = 1e-3


Carried = Mapping[str, Mapping[str, Mapping[str, Tensor]]]
"""See `build_synthetic_bank`."""


def check_router_conformance(
    router: type[OutputRouter],
    options: RouterOptions | None = None,
    *,
    carried: Carried | None = None,
) -> None:
    """Check a router class against the whole contract, on made-up banks.

    Args:
        router: The class that is registered.
        options: Its options; its defaults if None.
        carried: What contributions carry for a router that reads it, of "expert-0" to "expert-2"
            (`build_synthetic_bank`), of D = 16; nothing if None.

    Raises:
        PluginError: Naming every rule that is broken, with what was found.
    """
    title, page = f"Router '{router.__name__}'", "docs/hooks/routers.md"
    refuse_broken(title, examine_router(router, options, carried=carried), page=page)


def examine_router(
    router: type[OutputRouter],
    options: RouterOptions | None = None,
    *,
    carried: Carried | None = None,
) -> tuple[CheckResult, ...]:
    """What `check_router_conformance` finds, one result a check.

    Args:
        router: The class that is registered.
        options: Its options; its defaults if None.
        carried: See `check_router_conformance`.
    """
    name = "reads columns that banks have"
    try:
        chosen = router.Options() if options is None else options
        reads = router.reads(chosen)
    except Exception as error:
        return (CheckResult(name, f"expected columns that it reads, got {describe_raised(error)}"),)
    if not reads <= ALL_READINGS:
        problem = f"expected reads among {sorted(ALL_READINGS)}, got {sorted(reads)}"
        return (CheckResult(name, problem),)
    bank = build_synthetic_bank(readings=reads, carried=carried)
    held_out = build_synthetic_bank(HeldOutBank, seed=1, readings=reads, carried=carried)
    try:
        fitted = router.fit(bank, chosen, 0)
    except Exception as error:  # nothing can be asked of a router that cannot be fitted
        problem = f"expected a fitted router, got {describe_raised(error)}"
        return (CheckResult("fits on a calibration bank", problem),)
    case = _Case(router, chosen, bank, held_out, fitted, carried)
    checks = [*_ALWAYS, *(_CAUSAL if router.causal else (_refuses_to_step,))]
    return examine(checks, case)


@dataclass(frozen=True)
class _Case:
    router: type[OutputRouter]
    options: RouterOptions
    bank: CalibrationBank
    held_out: HeldOutBank
    fitted: OutputRouter
    carried: Carried | None

    @property
    def view(self) -> RouterView:
        return self.held_out.view(torch.tensor([0, 5, 9, 17]))


_Check = Callable[[_Case], str | None]


def _gates_are_distributions(case: _Case) -> str | None:
    gates = case.fitted.gates(case.view)
    shape = (*case.view.document_starts.shape, case.bank.num_experts)
    if tuple(gates.shape) != shape:
        return f"expected gates of shape {shape}, got {tuple(gates.shape)}"
    if bool((gates < 0).any()) or not _close(gates.sum(-1), torch.ones(shape[:2]), 1e-5):
        return "expected gates that are non-negative and sum to 1, got others"
    scores = case.fitted.scores(case.view)
    if tuple(scores.shape) != shape or not torch.equal(scores.argmax(-1), gates.argmax(-1)):
        return "expected scores that rank experts as gates do, got another order"
    return None


def _fit_is_deterministic(case: _Case) -> str | None:
    with other_chance():
        again = case.router.fit(case.bank, case.options, 0).state_tensors()
    first = case.fitted.state_tensors()
    same = first.keys() == again.keys() and all(torch.equal(first[n], again[n]) for n in first)
    return None if same else "expected the same router from the same bank and seed, got another"


def _fit_refuses_held_out(case: _Case) -> str | None:
    held_out: Any = case.held_out
    try:
        case.router.fit(held_out, case.options, 0)
    except RoutingError:
        return None
    return "expected fit to raise RoutingError on a HeldOutBank (check_calibration), got a router"


def _leaves_inputs_alone(case: _Case) -> str | None:
    fresh = build_synthetic_bank(readings=case.bank.readings)
    everything = slice(0, fresh.num_blocks)
    same = torch.equal(fresh.logprob, case.bank.logprob) and same_views(
        fresh.view(everything), case.bank.view(everything)
    )
    same = same and not any(case.bank.adapters.count_changes().values())
    view, copy = case.view, case.view
    case.fitted.gates(view)
    return None if same and same_views(view, copy) else "expected inputs as they were, got changed"


def _survives_saving(case: _Case) -> str | None:
    tensors = {name: t.contiguous() for name, t in case.fitted.state_tensors().items()}
    loaded = case.router(case.bank.num_experts, case.options, load(save(tensors)))
    if torch.equal(loaded.gates(case.view), case.fitted.gates(case.view)):
        return None
    return "expected the same gates after saving and loading, got others"


def _does_not_prefer_places(case: _Case) -> str | None:
    order = [2, 0, 1]
    moved = case.router.fit(permute_experts(case.bank, order), case.options, 0)
    there = compute_router_losses(permute_experts(case.held_out, order), moved).nll.mean()
    here = compute_router_losses(case.held_out, case.fitted).nll.mean()
    difference = abs(float(there - here))
    if difference <= ORDER_TOLERANCE_NATS:
        return None
    return f"expected a loss that experts' order does not change, got {difference:.3f} nats"


def _gives_a_lone_expert_everything(case: _Case) -> str | None:
    bank = build_synthetic_bank(num_experts=1, readings=case.bank.readings, carried=case.carried)
    gates = case.router.fit(bank, case.options, 0).gates(bank.view(slice(0, 2)))
    return None if bool((gates == 1).all()) else "expected gate 1 for a lone expert, got less"


def _takes_few_and_many_experts(case: _Case) -> str | None:
    for count in (2, 16):
        bank = build_synthetic_bank(
            num_experts=count, blocks_per_domain=2, readings=case.bank.readings
        )
        view = bank.view(slice(0, 2))
        gates = case.router.fit(bank, case.options, 0).gates(view)
        fault = find_distribution_fault(gates, (*view.document_starts.shape, count))
        if fault is not None:
            return f"{fault}, with {count} experts"
    return None


def _is_no_worse_than_equal_gates(case: _Case) -> str | None:
    """On documents as long as a block; expert e is good at domain e, columns tell domains apart."""
    shape: dict[str, Any] = {
        "blocks_per_domain": 4,
        "block_size": 64,
        "readings": case.bank.readings,
    }
    bank = _join_documents(build_synthetic_bank(seed=2, **shape))
    held_out = _join_documents(build_synthetic_bank(HeldOutBank, seed=3, **shape))
    fitted = case.router.fit(bank, case.options, 0)
    own, equal = (
        float(compute_router_losses(held_out, router).nll.mean()) for router in (fitted, None)
    )
    said = f"{own:.3f} nats a token, {equal:.3f} of equal gates"
    if own <= equal + EQUAL_TOLERANCE_NATS:
        return Remark(said)
    return f"expected a loss not above that of equal gates on held-out blocks, got {said}"


def _join_documents(bank: Any) -> Any:
    """The bank with one document a block."""
    starts = torch.zeros_like(bank.document_starts)
    starts[:, 0] = True
    return replace(bank, document_starts=starts, _derived={})


def _sees_no_future(case: _Case) -> str | None:
    return find_leak(case.fitted.gates, case.view, tolerance=1e-6)


def _steps_like_the_full_form(case: _Case) -> str | None:
    view = case.view
    found = step_through(case.fitted, view)
    if _close(found, case.fitted.gates(view), STEP_TOLERANCE):
        return None
    return "expected step to give the gates of the full form, got others"


def _reorders_state(case: _Case) -> str | None:
    view, index = case.view, torch.tensor([2, 0, 0, 3])
    length, half = view.document_starts.shape[1], 9
    state = case.fitted.init_state(4)
    _, state = case.fitted.step(view.at(0, half), state)
    state = case.fitted.reorder(state, index)
    found, _ = case.fitted.step(take_rows(view.at(half, length), index), state)
    expected = case.fitted.gates(take_rows(view, index))[:, half:]
    if _close(found, expected, STEP_TOLERANCE):
        return None
    return "expected reorder to move the state's rows, got other gates"


def _refuses_to_step(case: _Case) -> str | None:
    try:
        case.fitted.step(case.view, {})
    except RoutingError:
        return None
    return "expected a non-causal router to raise RoutingError in step, got gates"


def _keeps_its_promise(case: _Case) -> str | None:
    try:
        evaluate(case.held_out, {"it": case.fitted})
    except RoutingError as error:
        return str(error).partition(": ")[2].partition(". ")[0]
    return None


def _plan_sums(case: _Case) -> tuple[SummedFit, dict[str, float]] | None:
    """How the case's router is fitted by sums; None where it is on pooled text only."""
    try:
        fit = plan_summed_fit(case.router, collect_setting([case.bank], case.options, 0))
    except RoutingError:
        return None
    return fit, weigh_domains([case.bank])


def _sums_add_up(case: _Case) -> str | None:
    plan = _plan_sums(case)
    if plan is None:
        return Remark("not asked: it is fitted on pooled text only")
    fit, weights = plan
    parts = [take_blocks(case.bank, range(first, case.bank.num_blocks, 2)) for first in range(2)]
    state = fit.start()
    while not isinstance(state, Finished):
        sent = fit.send(state)
        entries = fit.entries(sent)
        # Packing refuses sums that are not as declared, or beyond their bounds.
        whole = answer_round(fit, case.bank, sent, weights)
        added = add_plainly([answer_round(fit, part, sent, weights) for part in parts], whole)
        totals, expected = (unpack_sums(vector, entries) for vector in (added, whole))
        for name, total in totals.items():
            allowed = SUM_TOLERANCE * max(1e-3, float(expected[name].abs().max()))
            if not _close(total, expected[name], allowed):
                return f"expected sums '{name}' of two halves to add up to the whole, got others"
        state = fit.advance(state, expected)
    return None


def _fits_by_sums_whoever_has_the_text(case: _Case) -> str | None:
    if _plan_sums(case) is None:
        return Remark("not asked: it is fitted on pooled text only")
    domains = case.bank.domain_of
    members = [take_blocks(case.bank, np.flatnonzero(domains == d)) for d in np.unique(domains)]
    one, other = (
        fit_by_sums(case.router, banks, case.options, 0)[0] for banks in ([case.bank], members)
    )
    if _close(one.gates(case.view), other.gates(case.view), SPLIT_TOLERANCE):
        return None
    return "expected a fit by sums to give the same router however text is shared out, got another"


def _is_made_from_statistics_alone(case: _Case) -> str | None:
    generator, width = torch.Generator().manual_seed(0), case.bank.hidden_size
    names = [name for name in case.bank.expert_names if name != BASE_EXPERT]
    domains = [case.bank.domains[place % len(case.bank.domains)] for place in range(len(names))]
    statistics = {
        name: collect_statistics(domain, [torch.randn(4, 16, width, generator=generator) + place])
        for place, (name, domain) in enumerate(zip(names, domains, strict=True))
    }
    setting = collect_setting([case.bank], case.options, 0)
    try:
        made = make_published(case.router, statistics, setting)
    except RoutingError:
        return Remark("not asked: it is fitted on text only")
    again = make_published(case.router, dict(reversed(statistics.items())), setting)
    tensors, same = made.state_tensors(), again.state_tensors()
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        return "expected finite numbers made of statistics, got others"
    if tensors.keys() == same.keys() and all(torch.equal(tensors[n], same[n]) for n in tensors):
        return None
    return "expected the same router from the same statistics in any order, got another"


_ALWAYS: tuple[_Check, ...] = (
    _gates_are_distributions,
    _fit_is_deterministic,
    _fit_refuses_held_out,
    _leaves_inputs_alone,
    _survives_saving,
    _does_not_prefer_places,
    _gives_a_lone_expert_everything,
    _takes_few_and_many_experts,
    _is_no_worse_than_equal_gates,
    _keeps_its_promise,
    _sums_add_up,
    _fits_by_sums_whoever_has_the_text,
    _is_made_from_statistics_alone,
)
_CAUSAL: tuple[_Check, ...] = (_sees_no_future, _steps_like_the_full_form, _reorders_state)


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return torch.allclose(found.float(), expected.float(), rtol=0.0, atol=tolerance)
