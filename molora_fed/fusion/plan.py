"""What a fusion will do, checked before anything is computed."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.updates import Adapter
from molora_fed.bank import Expert, ExpertAdapters
from molora_fed.bank.adapters import open_adapters
from molora_fed.charter import AdapterRules, Charter
from molora_fed.contributions.contributed import Entrant
from molora_fed.errors import CharterError, ConfigError, PluginError, RoutingError
from molora_fed.evaluation.composition import RESERVED_NAMES
from molora_fed.forecasting.records import FAILED
from molora_fed.guard import guarded, refuse
from molora_fed.models.base import Base, check_base
from molora_fed.models.batches import fit_batch
from molora_fed.plugins import Entry, Plugins
from molora_fed.routing.contract import OutputRouter, RouterOptions
from molora_fed.routing.published import check_published, make_up_setting
from molora_fed.routing.summed import plan_summed_fit
from molora_fed.routing.top_k import limit_experts
from molora_fed.storage.options import check_choices, read_choice
from molora_fed.types import BASE_EXPERT, Reading

__all__ = [
    "BASE_EXPERT",
    "FusionPlan",
    "build_routers",
    "check_labels",
    "check_published_router",
    "check_readings",
    "plan_fusion",
]


@dataclass(frozen=True, eq=False)
class FusionPlan:
    """Everything a fusion needs, in its final order.

    Attributes:
        charter: Under which rules.
        contributions: Sorted by contribution id.
        experts: The base first if the charter says so, then the contributions.
        adapters: The experts' adapters, for routers.
        router: Key of the router that is published, unless it collapses: its registered name.
        routers: Class and options by key, see `Choice`; the published one first.
        failed: Why compared routers cannot be used, by key.
        bank: Further arguments of both banks: readings, mixture, batch, frozen depth.
        plugins: Where adapter kinds are registered.
    """

    charter: Charter
    contributions: tuple[Entrant, ...]
    experts: tuple[Expert, ...]
    adapters: ExpertAdapters
    router: str
    routers: Mapping[str, tuple[type[OutputRouter], RouterOptions]]
    failed: Mapping[str, str]
    bank: Mapping[str, Any]
    plugins: Plugins

    @property
    def rules(self) -> AdapterRules:
        """The charter's limits on adapters."""
        return self.charter.identity.adapters

    @property
    def shortlist(self) -> int | None:
        """Experts that a member measures on all of its text; None if that is all of them."""
        size = self.charter.amendment.fusion.shortlist
        is_short = size is not None and size < len(self.experts) and self.charter.is_summed
        return size if is_short else None

    @property
    def own_domain(self) -> dict[str, str]:
        """Domain each specialist was trained on."""
        return {c.contributor: c.domain for c in self.contributions}

    @property
    def adapter_folders(self) -> dict[str, Path]:
        """Folder of each specialist's adapter."""
        return {c.contributor: c.adapter for c in self.contributions}

    def router_entry(self, key: str) -> Entry:
        """Who registered a router of the plan."""
        return self.plugins.routers.entry(self.charter.amendment.fusion.routers[key].name)

    def load_adapters(self) -> list[Adapter | None]:
        """The experts' adapters, all in memory; None for the base."""
        return [expert.load() for expert in self.experts]


def plan_fusion(
    base: Base, charter: Charter, contributions: Sequence[Entrant], plugins: Plugins
) -> FusionPlan:
    """Check everything that can be checked before the first forward pass.

    Raises:
        BaseCheckpointError: If the base is not the charter's.
        CharterError: If the charter does not fuse by a router, or options are wrong; all of them
            are named. See `build_routers`, too.
        ConfigError: If there is no contribution, or names clash.
        UnknownNameError: If nobody registers a router, a merge or a predictor with options.
    """
    check_base(base, charter.identity.base)
    _check_mode(charter)
    ordered = tuple(sorted(contributions, key=lambda c: c.id))
    rules, fusion = charter.identity.adapters, charter.amendment.fusion
    _check_names(ordered)
    failed: dict[str, str] = {}
    routers = build_routers(charter, plugins, on_failed=failed.__setitem__)
    check_choices(
        (
            (plugins.merges, "fusion.merges", fusion.merges),
            (plugins.gain_predictors, "fusion.predictors", fusion.predictors),
        )
    )
    check_labels(charter, plugins)
    readings: frozenset[Reading] = frozenset().union(
        *(router.reads(options) for router, options in routers.values())
    )
    base_experts = [Expert(BASE_EXPERT, None)] if fusion.base_expert else []
    specialists = [
        Expert(
            c.contributor,
            partial(
                load_adapter,
                c.adapter,
                rules=rules,
                model=base.model,
                plugins=plugins,
                name=c.contributor,
            ),
            c.carried,
        )
        for c in ordered
    ]
    experts = (*base_experts, *specialists)
    return FusionPlan(
        charter=charter,
        contributions=ordered,
        experts=experts,
        adapters=open_adapters(experts, base.model, rules.frozen_depth),
        router=fusion.router,
        routers=routers,
        failed=failed,
        bank={
            "readings": readings,
            "mixture": fusion.mixture,
            "batch": fit_batch(
                base.model,
                charter.identity.corpus.block_size,
                charter.identity.corpus.evaluation_batch,
            ),
            "frozen_depth": rules.frozen_depth,
        },
        plugins=plugins,
    )


def check_labels(charter: Charter, plugins: Plugins) -> None:
    """Refuse labels of merges and predictors that a result has another meaning for.

    Raises:
        CharterError: Naming all of them.
    """
    fusion = charter.amendment.fusion
    taken = {
        "merges": {one.label for one in fusion.merges} & RESERVED_NAMES,
        # All predictors that are registered are asked, and stand in one table.
        "predictors": {one.label for one in fusion.predictors}
        & set(plugins.gain_predictors.names()),
    }
    wrong = [f"{', '.join(sorted(labels))} of {key}" for key, labels in taken.items() if labels]
    if wrong:
        raise CharterError(
            f"Cannot use charter '{charter.identity.name}': expected labels in amendment.fusion "
            f"that mean nothing else, got {'; '.join(wrong)}. Choose other labels."
        )


def _check_mode(charter: Charter) -> None:
    if charter.amendment.fusion.mode != "router":
        raise CharterError(
            f"Cannot fuse cooperative '{charter.identity.name}' by a router: expected fusion mode "
            f"'router', got '{charter.amendment.fusion.mode}'. Use `molora evolve`, or amend "
            "fusion.mode."
        )


def _check_names(contributions: Sequence[Entrant]) -> None:
    if not contributions:
        raise ConfigError(
            "Cannot fuse: expected at least one admitted contribution, got none. "
            "Wait for contributors, or look at why theirs were refused."
        )
    counts = Counter(c.contributor for c in contributions)
    clashes = sorted(name for name, n in counts.items() if n > 1 or name == BASE_EXPERT)
    if clashes:
        raise ConfigError(
            f"Cannot fuse: expected contributors of different names, none '{BASE_EXPERT}', "
            f"got {', '.join(clashes)}. Rename or leave out one of them."
        )


def build_routers(
    charter: Charter,
    plugins: Plugins,
    *,
    on_failed: Callable[[str, str], None] | None = None,
) -> dict[str, tuple[type[OutputRouter], RouterOptions]]:
    """Class and options of every router that a charter names, by key; the published one first.

    Args:
        charter: The charter.
        plugins: Where routers are registered.
        on_failed: Told the key of each compared router whose plugin fails, and why; that router is
            left out then. None takes every failure as an error.

    Raises:
        CharterError: If its options are wrong; all of them are named. If it reads the experts'
            average state where members measure shortlists of experts.
        PluginError: If the plugin of the published router fails.
        UnknownNameError: If nobody registers a router.
    """
    fusion = charter.amendment.fusion
    routers: dict[str, tuple[type[OutputRouter], RouterOptions]] = {}
    for key, choice in fusion.routers.items():
        try:
            router, chosen = read_choice(
                plugins.routers,
                choice,
                key="fusion.options" if key == fusion.router else "fusion.compare",
            )
            reads = check_readings(plugins.routers.entry(choice.name), router, chosen)
        except PluginError as error:
            if on_failed is None or key == fusion.router:
                raise
            on_failed(key, f"{FAILED}{error}")
            continue
        if fusion.shortlist is not None and charter.is_summed and "mean_hidden" in reads:
            raise CharterError(
                f"Cannot use charter '{charter.identity.name}': expected routers that do not read "
                f"the experts' average state, of which a shortlist knows some, got '{key}'. "
                "Leave out fusion.shortlist, or choose another router or input."
            )
        if key == fusion.router and fusion.top_k is not None:
            router = limit_experts(router, fusion.top_k)
        routers[key] = (router, chosen)
    return routers


def check_published_router(charter: Charter, plugins: Plugins) -> None:
    """Refuse a published router that cannot be made where text stays with its owners.

    Raises:
        CharterError: If it can neither be made from published statistics nor, where there are none,
            be fitted by sums; or if its options are wrong.
        PluginError: If its plugin fails.
    """
    name = charter.amendment.fusion.router
    router, options = build_routers(charter, plugins, on_failed=lambda name, why: None)[name]
    if charter.publishes_statistics:
        place, made, other = "from_statistics", "made from published statistics", "text"
    else:
        place, made, other = "by_sums", "fitted by sums", "pooled text"
    try:
        with guarded(plugins.routers.entry(name), place, passing=(RoutingError,)):
            if charter.publishes_statistics:
                check_published(router, options)
            else:
                plan_summed_fit(router, make_up_setting(options))
    except RoutingError as error:
        raise CharterError(
            f"Cannot use charter '{charter.identity.name}': expected a router that is {made} with "
            f"its options, got '{name}', which has to be fitted on {other}. Choose another router, "
            "or another mode of privacy."
        ) from error


def check_readings(
    entry: Entry, router: type[OutputRouter], options: RouterOptions
) -> frozenset[Reading]:
    """What a router reads.

    Args:
        entry: Who registered it.
        router: Its class.
        options: Its options.

    Raises:
        PluginError: If it reads what no bank has, or fails.
    """
    with guarded(entry, "reads"):
        reads = frozenset(router.reads(options))
    known = frozenset(get_args(Reading))
    if not reads <= known:
        raise refuse(
            entry,
            "reads",
            expected=f"columns among {', '.join(sorted(known))}",
            got=", ".join(sorted(map(str, reads - known))),
        )
    return reads
