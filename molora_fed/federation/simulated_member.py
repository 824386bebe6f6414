"""A simulated contributor as its supervisor sees it: a home, and what changed there."""

from dataclasses import dataclass, field
from typing import Any

from molora_fed.charter import load_charter
from molora_fed.errors import CharterError, FederationError
from molora_fed.federation.events import FederationEvent
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.supervise import raise_recorded
from molora_fed.federation.worker_mail import give_consent, has_consent

__all__ = ["SimulatedMember"]


@dataclass(eq=False)
class SimulatedMember:
    """One simulated contributor.

    Attributes:
        home: Its home.
        settings: What it joins with.
        agreed: Whether it agreed to what the charter asks for.
        shown: Where it stood when that was last reported.
    """

    home: ContributorHome
    settings: JoinSettings
    agreed: bool = False
    shown: FederationEvent | None = field(default=None, repr=False)

    @property
    def acknowledgement(self) -> dict[str, Any]:
        """What the coordinator acknowledged; empty before it did."""
        return dict(read_json(self.home.acknowledgement_letter) or {})

    def settle(self) -> None:
        """Agree to what the charter asks for, once it is here: nothing leaves this machine."""
        if self.agreed:
            return
        try:
            charter = load_charter(self.home.charter)
        except CharterError:
            return  # not here yet
        if not has_consent(self.home, charter):
            give_consent(self.home, charter)
        self.agreed = True

    def check(self) -> None:
        """Raise the bad news there is.

        Raises:
            FederationError: If the server refused this contributor.
            MoloraError: Whatever ended its work.
        """
        refusal = read_json(self.home.refusal_letter)
        if refusal is not None:
            raise FederationError(str(refusal.get("reason", "The server refused."))[:500])
        if self.home.error_file.exists():
            name = self.settings.name
            raise_recorded(self.home.error_file, otherwise=f"Cannot go on for '{name}'.")

    def describe(self) -> FederationEvent | None:
        """Where it stands, if that has changed."""
        state = self.home.read_state()
        if not state:
            return None
        event = FederationEvent(
            **state,
            contributor=self.settings.name,
            state=str(self.acknowledgement.get("state", "")),
            seen_by="contributor",
        )
        if event == self.shown:
            return None
        self.shown = event
        return event
