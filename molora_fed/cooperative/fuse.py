"""The coordinator's flow: admitted contributions, a fused model, its report, the ledger's record.

`molora fuse` takes contributions from folders, the federation's coordinator from its mailboxes;
both fuse them here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from molora_fed.charter import Charter
from molora_fed.contributions.contributed import collect_contributed
from molora_fed.contributions.ledger import Ledger
from molora_fed.contributions.manifest import Contribution, load_contribution
from molora_fed.contributions.receive import load_admitted
from molora_fed.cooperative.admit import check_all_admitted, find_contribution, receive_folders
from molora_fed.cooperative.cooperative import Cooperative
from molora_fed.cooperative.decisions import ForecastKeeper, begin_fusion, end_fusion
from molora_fed.cooperative.known_text import read_known_text
from molora_fed.fusion.fuse import Control, FusionResult, fuse
from molora_fed.models.base import Base
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.reporting.report import MetricRows, read_metrics_file, write_report
from molora_fed.training.loop import METRICS_NAME
from molora_fed.types import Progress

__all__ = ["FusedContributions", "fuse_admitted", "fuse_contributions"]

ACTOR = "molora fuse"


@dataclass(frozen=True, eq=False)
class FusedContributions:
    """A fused model, what it was made of, and its report.

    Attributes:
        contributions: What was fused, in canonical order.
        result: What the fusion measured, with the fused model.
        report: Path of report.html.
    """

    contributions: tuple[Contribution, ...]
    result: FusionResult
    report: Path


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
        LedgerError: If another process, such as a server, works on the cooperative.
        MoloraError: Whatever admission or fusing refuses.
    """
    plugins = plugins or get_plugins()
    sources = [find_contribution(folder) for folder in folders]
    given = {load_contribution(source).id: source for source in sources}
    with cooperative.open_ledger() as ledger:
        on_phase("base")
        base = cooperative.load_base()
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
            texts={**read_known_text(cooperative.folder), **_find_texts(contributions, given)},
            metrics=_collect_metrics(contributions, given),
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
    texts: Mapping[str, Path] | None = None,
    controls: Mapping[str, Control] | None = None,
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
        texts: Folders of the contributors' prepared corpora that lie on this machine.
        controls: Models trained on pooled text, to compare with, by name.
        metrics: Training metrics for the report, by contributor.
        publish: Hands the fused model on, before the ledger says that it is published.
        on_phase: Told what begins.
        progress: Receives progress within a phase.

    Raises:
        MoloraError: Whatever fusing refuses.
    """
    known = texts or {}
    contributed = [
        collect_contributed(one, corpus=known.get(one.manifest.contributor))
        for one in contributions
    ]
    if contributed:
        begin_fusion(ledger, actor=actor)
    result = fuse(
        base,
        charter,
        contributed,
        out,
        plugins=plugins,
        controls=controls,
        on_phase=on_phase,
        on_forecasts=ForecastKeeper(ledger, actor=actor),
        progress=progress,
    )
    on_phase("report")
    report = write_report(result.result, metrics or {}, out / "report")
    fused = FusedContributions(tuple(contributions), result, report)
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
