"""Whom a fusion takes: admitted contributions, opened, and where their texts lie."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from molora_fed.adapters.files import check_adapter_fits, load_adapter
from molora_fed.charter import Charter
from molora_fed.contributions.build import count_samples
from molora_fed.contributions.contributed import (
    Contributed,
    Entrant,
    collect_contributed,
    collect_entrant,
)
from molora_fed.contributions.decision import list_quoted
from molora_fed.contributions.ledger import Ledger
from molora_fed.contributions.manifest import Contribution
from molora_fed.contributions.receive import Receipt
from molora_fed.cooperative.judging import quarantine
from molora_fed.errors import AdapterError, AdmissionError, CorpusError, MoloraError
from molora_fed.forecasting.records import FAILED
from molora_fed.fusion.private_texts import Members, PrivateTexts
from molora_fed.fusion.texts import Control, FusionTexts, PooledTexts
from molora_fed.models.base import Base
from molora_fed.plugins import Plugins
from molora_fed.types import Finding, Split

__all__ = ["OpenedMembers", "PooledSource", "PrivateSource"]


@dataclass(frozen=True, eq=False)
class PooledSource:
    """Samples that contributors sent.

    Attributes:
        charter: The charter with the amendment that counts now.
        texts: Folders of prepared corpora that lie on this machine, by contributor.
        controls: Models trained on pooled text, to compare with, by name.
    """

    charter: Charter
    texts: Mapping[str, Path]
    controls: Mapping[str, Control] = field(default_factory=dict)

    def collect(self, one: Contribution) -> Contributed:
        """What fusing needs of a contribution.

        Raises:
            CorpusError: If its samples are malformed; AdapterError if they are not those stated.
        """
        return collect_contributed(one, corpus=self.texts.get(one.manifest.contributor))

    def choose(
        self, found: Sequence[Entrant], leave_out: Callable[[Entrant, MoloraError], None]
    ) -> list[Entrant]:
        """Calibration blocks of everybody or of nobody, as the amendment of today says.

        Who came under an earlier one may have none, or some that nobody asks for any more.

        Args:
            found: From `collect`.
            leave_out: Told who cannot be fused, and why.
        """
        contributed = [one for one in found if isinstance(one, Contributed)]
        lacking = [one for one in contributed if not one.calibration]
        if not lacking or len(lacking) == len(contributed):
            return list(found)
        if Split.CALIBRATION not in count_samples(self.charter):
            return [replace(one, calibration=None) for one in contributed]
        for one in lacking:
            leave_out(
                one,
                CorpusError(
                    f"Cannot fuse contribution of '{one.contributor}': expected the calibration "
                    f"blocks that amendment {self.charter.amendment.number} asks for, got none. "
                    "Have it signed and sent again."
                ),
            )
        return [one for one in found if one not in lacking]

    def gather(self, found: Sequence[Entrant]) -> FusionTexts:
        """The texts of those that are fused."""
        chosen = [one for one in found if isinstance(one, Contributed)]
        return PooledTexts(chosen, self.controls)


@dataclass(frozen=True, eq=False)
class PrivateSource:
    """Texts that stay with contributors.

    Attributes:
        members: Asks them.
    """

    members: Members

    def collect(self, one: Contribution) -> Entrant:
        """What fusing needs of a contribution."""
        return collect_entrant(one)

    def choose(
        self, found: Sequence[Entrant], leave_out: Callable[[Entrant, MoloraError], None]
    ) -> list[Entrant]:
        """All of them."""
        return list(found)

    def gather(self, found: Sequence[Entrant]) -> FusionTexts:
        """The texts of those that are fused."""
        return PrivateTexts(found, self.members)


@dataclass(frozen=True, eq=False)
class OpenedMember:
    """An admitted contribution with what fusing reads of it."""

    contribution: Contribution
    entrant: Entrant


class OpenedMembers:
    """Opens admitted contributions; who cannot be fused is quarantined, and the others go on.

    Args:
        ledger: Open for writing.
        charter: The charter with the amendment that counts now.
        base: Its base.
        plugins: Where adapter kinds are registered.
        source: Where their texts lie.
        actor: Who does this, for the history.

    Attributes:
        left_out: Where those who cannot be fused stand now.
    """

    def __init__(
        self,
        ledger: Ledger,
        charter: Charter,
        base: Base,
        plugins: Plugins,
        source: PooledSource | PrivateSource,
        actor: str,
    ) -> None:
        self.left_out: list[Receipt] = []
        self._ledger = ledger
        self._charter = charter
        self._base = base
        self._plugins = plugins
        self._source = source
        self._actor = actor

    def open(self, contributions: Sequence[Contribution]) -> list[OpenedMember]:
        """Read what fusing needs of each.

        Raises:
            AdmissionError: If there were some and none can be fused.
        """
        found = []
        for one in contributions:
            try:
                found.append(OpenedMember(one, self._read(one)))
            except (AdapterError, CorpusError) as error:
                self.leave_out(one, error)
        found = self._choose(found)
        if contributions:
            self.check_somebody_left(found)
        return found

    def _read(self, one: Contribution) -> Entrant:
        name = one.manifest.contributor
        entrant = self._source.collect(one)
        adapter = load_adapter(
            entrant.adapter,
            rules=self._charter.identity.adapters,
            model=self._base.model,
            plugins=self._plugins,
            name=name,
        )
        check_adapter_fits(adapter, self._base.model, rules=self._charter.identity.adapters)
        return entrant

    def _choose(self, found: list[OpenedMember]) -> list[OpenedMember]:
        """Those whose texts can be used together."""
        by_id = {one.entrant.id: one.contribution for one in found}
        chosen = self._source.choose(
            [one.entrant for one in found], lambda one, why: self.leave_out(by_id[one.id], why)
        )
        return [OpenedMember(by_id[one.id], one) for one in chosen]

    def leave_out(self, one: Contribution, error: MoloraError) -> None:
        """Quarantine a contribution that cannot be fused, with the reason."""
        finding = Finding(
            "a contribution that can be fused with the others",
            str(error).rstrip("."),
            "Look at it, then reject, withdraw or release it.",
            quarantine=True,
        )
        receipt = quarantine(self._ledger, one.id, "fusion", finding, actor=self._actor)
        self.left_out.append(receipt)

    def describe(self) -> dict[str, str]:
        """Why contributors are left out, by name."""
        return {
            one.contributor: FAILED + one.decision.refusals[0].found
            for one in self.left_out
            if one.decision is not None
        }

    def check_somebody_left(self, members: Sequence[OpenedMember]) -> None:
        """Refuse to fuse nobody.

        Raises:
            AdmissionError: Saying why each was left out.
        """
        if not members:
            raise AdmissionError(
                "Cannot fuse: expected at least one contribution that can be fused, got none; "
                f"{list_quoted([f'{name} {why}' for name, why in self.describe().items()])}. "
                "See `molora coop list`."
            )
