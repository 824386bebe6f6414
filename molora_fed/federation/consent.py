"""What a contributor agreed to send, and whether a charter asks for more."""

from typing import Any

from pydantic import Field, ValidationError

from molora_fed.charter import Amendment, Charter
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.mailbox import read_json
from molora_fed.options import Choice
from molora_fed.storage.files import write_json
from molora_fed.storage.settings import UntrustedModel

__all__ = ["give_consent", "has_consent"]


class _AskedSums(UntrustedModel):
    """What of an amendment decides how many sums are asked for, over how much text."""

    routers: dict[str, dict[str, Any]]
    # Left out where there are none: what was agreed to before there were any still counts.
    labelled: list[Choice] = Field(default=[], exclude_if=lambda chosen: not chosen)
    merges: list[Choice]
    restarts: int
    base_expert: bool
    calibration: int
    held_out: int
    shortlist: int | None = Field(default=None, exclude_if=lambda size: size is None)

    def covers(self, other: "_AskedSums") -> bool:
        """Whether another amendment asks for nothing that this one does not."""
        return (
            all(self.routers.get(name) == chosen for name, chosen in other.routers.items())
            and all(chosen in self.labelled for chosen in other.labelled)
            and all(chosen in self.merges for chosen in other.merges)
            and other.restarts <= self.restarts
            and other.base_expert <= self.base_expert
            and other.calibration <= self.calibration
            and other.held_out <= self.held_out
            # Without one more losses are told, with one which of the experts are on it.
            and other.shortlist == self.shortlist
        )


def _describe_sums(amendment: Amendment) -> _AskedSums:
    rules, samples = amendment.fusion, amendment.samples
    routers = rules.routers.values()
    return _AskedSums(
        routers={one.name: one.options for one in routers if not one.label},
        labelled=[one for one in routers if one.label],
        merges=list(rules.merges),
        restarts=rules.restarts,
        base_expert=rules.base_expert,
        calibration=samples.calibration,
        held_out=samples.held_out,
        shortlist=rules.shortlist,
    )


def _build_consent(charter: Charter) -> dict[str, Any]:
    """What a contributor agrees to: these samples, or sums, for this cooperative.

    Mode of privacy and way of summing are the identity's.
    """
    amendment = charter.amendment
    agreed = {"identity": charter.identity_hash, "samples": "private"}
    if charter.is_summed:
        return {**agreed, "sums": _describe_sums(amendment).model_dump(mode="json")}
    if charter.is_private:  # figures and adapted slots instead of samples
        return agreed
    return {**agreed, "samples": amendment.samples.model_dump(mode="json")}


def has_consent(home: ContributorHome, charter: Charter) -> bool:
    """Whether the contributor agreed to send what this charter asks for, or more."""
    given = read_json(home.consent_file)
    if not charter.is_summed:
        return bool(given == _build_consent(charter))
    if not isinstance(given, dict) or given.get("identity") != charter.identity_hash:
        return False
    try:
        agreed = _AskedSums.model_validate(given.get("sums"))
    except ValidationError:
        return False
    return agreed.covers(_describe_sums(charter.amendment))


def give_consent(home: ContributorHome, charter: Charter) -> None:
    """Note that the contributor agrees to send what this charter asks for.

    Raises:
        StorageError: On I/O errors.
    """
    write_json(home.consent_file, _build_consent(charter))
