"""The coordinator's flow: admitted contributions, a fused model, its report, the ledger's record.

A contribution that cannot be fused is quarantined and the others are fused without it.

`molora fuse` takes contributions from folders, the federation's coordinator from its mailboxes;
both fuse them here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from molora_fed.charter import Charter
from molora_fed.contributions.contributed import (
    Entrant,
)
from molora_fed.contributions.ledger import Ledger
from molora_fed.contributions.manifest import Contribution, load_contribution
from molora_fed.contributions.receive import Receipt, load_admitted
from molora_fed.cooperative.admit import check_all_admitted, find_contribution, receive_folders
from molora_fed.cooperative.cooperative import Cooperative
from molora_fed.cooperative.decisions import ForecastKeeper, begin_fusion, end_fusion
from molora_fed.cooperative.known_text import read_known_text
from molora_fed.cooperative.opened_members import OpenedMembers, PooledSource, PrivateSource
from molora_fed.cooperative.pins import check_pins
from molora_fed.errors import (
    ConfigError,
    ExpertError,
    MoloraError,
)
from molora_fed.fusion.fuse import FusionResult, fuse_texts
from molora_fed.models.base import Base
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.reporting.report import MetricRows, read_metrics_file, write_report
from molora_fed.storage.options import Choice
from molora_fed.training.loop import METRICS_NAME
from molora_fed.types import Progress

__all__ = [
    "FusedContributions",
    "fuse_admitted",
    "fuse_contributions",
    "try_router",
]

ACTOR = "molora fuse"


@dataclass(frozen=True, eq=False)
class FusedContributions:
    """A fused model, what it was made of, and its report.

    Attributes:
        contributions: What was fused, in canonical order.
        result: What the fusion measured, with the fused model.
        report: Path of report.html.
        left_out: Where contributions stand that could not be fused and were quarantined for it.
    """

    contributions: tuple[Contribution, ...]
    result: FusionResult
    report: Path
    left_out: tuple[Receipt, ...] = ()


def fuse_contributions(
    cooperative: Cooperative,
    folders: Sequence[Path],
    *,
    out: Path | None = None,
    plugins: Plugins | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
    progress: Progress | None = None,
) -> FusedContributions:
    """Receive contributions, admit them, fuse, and write the report.

    Args:
        cooperative: Whose charter, base and ledger count.
        folders: Contributions, or folders of `make_contribution`; with none, all that the ledger
            has admitted are fused.
        out: Gets `bank/`, `fused/`, `result.json` and `report/`; the cooperative's folder if None.
        plugins: Where everything is registered; the installed plugins by default.
        on_phase: Told what begins.
        progress: Receives progress within a phase.

    Raises:
        AdmissionError: If contributions were not admitted; names all of them, and nothing is fused.
        ConfigError: If texts stay with their contributors: then the server fuses.
        PluginError: If plugins that the charter pins are not here as they are pinned.
        LedgerError: If another process, such as a server, works on the cooperative.
        MoloraError: Whatever admission or fusing refuses.
    """
    _check_texts_are_here(cooperative)
    plugins = plugins or get_plugins()
    check_pins(cooperative.charter, plugins)
    sources = [find_contribution(folder) for folder in folders]
    given = {load_contribution(source).id: source for source in sources}
    with cooperative.open_ledger() as ledger:
        on_phase("base")
        base = cooperative.load_base(progress)
        on_phase("admission")
        check_all_admitted(
            receive_folders(
                ledger,
                cooperative,
                base,
                given.values(),
                actor=ACTOR,
                plugins=plugins,
                progress=progress,
            )
        )
        contributions = _choose(ledger, cooperative, given)
        return fuse_admitted(
            ledger,
            cooperative.charter,
            base,
            contributions,
            out or cooperative.folder,
            actor=ACTOR,
            plugins=plugins,
            source=PooledSource(
                cooperative.charter,
                {**read_known_text(cooperative.folder), **_find_texts(contributions, given)},
            ),
            metrics=_collect_metrics(contributions, given),
            on_phase=on_phase,
            progress=progress,
        )


def _check_texts_are_here(cooperative: Cooperative) -> None:
    if cooperative.charter.is_private:
        raise ConfigError(
            f"Cannot fuse '{cooperative.folder}' here: expected texts that lie here, got a charter "
            "under which they stay with contributors. Run `molora serve`: it fuses once enough "
            "contributions are admitted, while their contributors are connected."
        )


def try_router(
    cooperative: Cooperative,
    router: str,
    *,
    out: Path | None = None,
    plugins: Plugins | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
    progress: Progress | None = None,
) -> FusionResult:
    """Fuse what is admitted with another router than the charter's, and publish nothing.

    The charter's router is measured beside it, with its options; the one that is tried has its
    defaults. The charter's `top_k` holds for it, and `fallback` does not take its place if it
    collapses.
    The ledger is read only: it keeps neither forecasts nor a fusion.

    Args:
        cooperative: Whose charter, base and admitted contributions count.
        router: Registered name.
        out: Gets `bank/`, `fused/` and `result.json`; `tried/` and its name in the cooperative's
            folder if None.
        plugins: Where everything is registered; the installed plugins by default.
        on_phase: Told what begins.
        progress: Receives progress within a phase.

    Raises:
        ConfigError: If it is the charter's own router, or texts stay with their contributors.
        UnknownNameError: If nobody registers it.
        MoloraError: Whatever fusing refuses.
    """
    _check_texts_are_here(cooperative)
    plugins = plugins or get_plugins()
    charter = cooperative.charter
    chosen = charter.amendment.fusion
    plugins.routers.entry(router)
    if router == chosen.router:
        raise ConfigError(
            f"Cannot try router '{router}': expected another one than the charter's, got that one. "
            "Fuse without trying a router."
        )
    published = Choice(name=chosen.router, options=chosen.options)
    compared = tuple(one for one in (published, *chosen.compare) if one.key != router)
    rules = chosen.model_copy(
        update={"router": router, "options": {}, "compare": compared, "fallback": ""}
    )
    amendment = charter.amendment.model_copy(update={"fusion": rules})
    charter = charter.model_copy(update={"amendment": amendment})

    def refuse(_one: Entrant, why: MoloraError) -> None:
        raise why  # a trial quarantines nobody

    on_phase("base")
    base = cooperative.load_base(progress)
    source = PooledSource(charter, read_known_text(cooperative.folder))
    with cooperative.read_ledger() as ledger:
        admitted = load_admitted(ledger, cooperative.store)
    found = source.choose([source.collect(one) for one in admitted], refuse)
    return fuse_texts(
        base,
        charter,
        source.gather(found),
        out or cooperative.folder / "tried" / router,
        plugins=plugins,
        on_phase=on_phase,
        progress=progress,
    )


def fuse_admitted(
    ledger: Ledger,
    charter: Charter,
    base: Base,
    contributions: Sequence[Contribution],
    out: Path,
    *,
    actor: str,
    plugins: Plugins,
    source: PooledSource | PrivateSource,
    metrics: Mapping[str, MetricRows] | None = None,
    publish: Callable[[FusedContributions], None] = lambda fused: None,
    on_phase: Callable[[str], None] = lambda phase: None,
    progress: Progress | None = None,
) -> FusedContributions:
    """Fuse admitted contributions, keep forecasts and decisions in the ledger, write the report.

    Args:
        ledger: Open for writing; ends as PUBLISHED.
        charter: The cooperative's charter.
        base: Its base.
        contributions: Admitted ones, in canonical order.
        out: Gets `bank/`, `fused/`, `result.json` and `report/`.
        actor: Who does this, for the history.
        plugins: Where everything is registered.
        source: Where the contributors' texts lie.
        metrics: Training metrics for the report, by contributor.
        publish: Hands the fused model on, before the ledger says that it is published.
        on_phase: Told what begins.
        progress: Receives progress within a phase.

    Raises:
        AdmissionError: If nobody can be fused.
        MoloraError: Whatever fusing refuses.
    """
    members = OpenedMembers(ledger, charter, base, plugins, source, actor)
    usable = members.open(contributions)
    while True:
        if usable:
            begin_fusion(ledger, actor=actor)
        try:
            result = fuse_texts(
                base,
                charter,
                source.gather([one.entrant for one in usable]),
                out,
                plugins=plugins,
                on_phase=on_phase,
                on_forecasts=ForecastKeeper(ledger, actor=actor),
                excluded=members.describe(),
                progress=progress,
            )
            break
        except ExpertError as error:
            faulty = [one for one in usable if one.entrant.contributor == error.expert]
            if not faulty:
                raise  # the base itself
            members.leave_out(faulty[0].contribution, error)
            # Whose columns are made stays in the bank: what was measured is not measured again.
            usable = [one for one in usable if one not in faulty]
            members.check_somebody_left(usable)
    on_phase("report")
    report = write_report(result.result, metrics or {}, out / "report")
    fused = FusedContributions(
        tuple(one.contribution for one in usable), result, report, tuple(members.left_out)
    )
    publish(fused)
    end_fusion(ledger, actor=actor, result=result.result)
    return fused


def _choose(ledger: Ledger, cooperative: Cooperative, given: dict[str, Path]) -> list[Contribution]:
    """The given contributions as they lie in the store; all admitted ones if none is given."""
    admitted = load_admitted(ledger, cooperative.store)
    return [one for one in admitted if not given or one.id in given]


def _find_texts(contributions: Sequence[Contribution], given: dict[str, Path]) -> dict[str, Path]:
    """Prepared corpora that lie beside contributions made on this machine, by contributor."""
    found = {one.manifest.contributor: given[one.id] for one in contributions if one.id in given}
    return {name: source.parent / "corpus" for name, source in found.items()}


def _collect_metrics(
    contributions: Sequence[Contribution], given: dict[str, Path]
) -> dict[str, MetricRows]:
    """Training metrics that lie beside contributions made on this machine, by contributor."""
    metrics: dict[str, MetricRows] = {}
    for one in contributions:
        file = given[one.id].parent / METRICS_NAME if one.id in given else None
        if file is not None and file.is_file():
            metrics[one.manifest.contributor] = read_metrics_file(file)
    return metrics
