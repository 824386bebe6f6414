"""Taking contributions from folders into a cooperative: what the server does with mail."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from molora_fed.contributions.ledger import Ledger
from molora_fed.contributions.receive import Receipt, receive_contribution
from molora_fed.contributions.states import ContributionState
from molora_fed.cooperative.cooperative import Cooperative
from molora_fed.cooperative.pins import check_pins
from molora_fed.errors import AdapterError, AdmissionError, LedgerError
from molora_fed.models.base import Base
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.types import Progress

__all__ = ["admit_contributions", "check_all_admitted", "find_contribution", "receive_folders"]

ACTOR = "molora coop admit"


def find_contribution(folder: Path) -> Path:
    """The contribution in a folder that `molora train` filled, or the folder itself."""
    inner = folder / "contribution"
    return inner if (inner / "manifest.json").is_file() else folder


def admit_contributions(
    cooperative: Cooperative,
    folders: Sequence[Path],
    *,
    plugins: Plugins | None = None,
    progress: Progress | None = None,
) -> list[Receipt]:
    """Receive contributions and judge them, without fusing: how a cooperative grows on folders.

    Args:
        cooperative: Whose charter, base and ledger count.
        folders: Contributions, or folders of `make_contribution`.
        plugins: Where checks and kinds are registered; the installed plugins by default.
        progress: Receives blocks done while losses are measured.

    Returns:
        A receipt for each, in the order given; also for what is not admitted.

    Raises:
        PluginError: If plugins that the charter pins are not here as they are pinned.
        LedgerError: If another process, such as a server, works on the cooperative.
        MoloraError: Whatever `receive_contribution` refuses.
    """
    check_pins(cooperative.charter, plugins or get_plugins())
    sources = [find_contribution(folder) for folder in folders]
    with cooperative.open_ledger() as ledger:
        base = cooperative.load_base(progress)
        return receive_folders(
            ledger, cooperative, base, sources, actor=ACTOR, plugins=plugins, progress=progress
        )


def receive_folders(
    ledger: Ledger,
    cooperative: Cooperative,
    base: Base,
    sources: Iterable[Path],
    *,
    actor: str,
    plugins: Plugins | None = None,
    progress: Progress | None = None,
) -> list[Receipt]:
    """Receive contributions under an open ledger; see `admit_contributions`.

    Args:
        ledger: The cooperative's ledger, open for writing.
        cooperative: Whose charter and store count.
        base: Its base, checked.
        sources: Folders of contributions.
        actor: Who does this, for the history.
        plugins: Where checks and kinds are registered; the installed plugins by default.
        progress: Receives blocks done while losses are measured.

    Raises:
        AdapterError: If one cannot be received, or LedgerError; the others are, all the same.
        AdmissionError: If several cannot; names all of them.
    """
    receipts, refused = [], []
    for source in sources:
        try:
            receipts.append(
                receive_contribution(
                    ledger,
                    cooperative.store,
                    source,
                    charter=cooperative.charter,
                    base=base,
                    plugins=plugins or get_plugins(),
                    actor=actor,
                    progress=progress,
                    public_folder=cooperative.public_folder,
                )
            )
        except (AdapterError, LedgerError) as error:  # one folder's fault is not the others'
            refused.append(error)
    if len(refused) == 1:
        raise refused[0]
    if refused:
        raise AdmissionError(" ".join(str(error) for error in refused))
    return receipts


def check_all_admitted(receipts: Sequence[Receipt]) -> None:
    """Refuse to go on unless all were admitted.

    Raises:
        AdmissionError: With a sentence for each refusal, in one line.
    """
    problems = []
    for receipt in receipts:
        if receipt.decision is not None:
            problems += [refusal.message for refusal in receipt.decision.refusals]
        if receipt.state == ContributionState.WITHDRAWN:
            problems.append(
                f"Cannot fuse contribution of '{receipt.contributor}': expected an admitted one, "
                "got a withdrawn one. Leave it out."
            )
    if problems:
        raise AdmissionError(" ".join(problems))
