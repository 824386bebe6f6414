"""Questions of a fusion of members whose texts stay with them, and what each says of its text."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, model_validator
from torch import Tensor

from molora_fed.charter import Charter
from molora_fed.fusion.claims import Claim
from molora_fed.storage.files import canonical_json, hash_bytes
from molora_fed.storage.settings import UntrustedModel

__all__ = [
    "FIRST_FIT",
    "HELD_OUT",
    "LOSSES",
    "MAX_FUSIONS",
    "SumQuestion",
    "TextCounts",
    "join_states",
    "name_fusion",
]

MAX_FUSIONS = 64
"""Fusions that a member takes part in under one amendment: a cooperative that grows."""
HELD_OUT = "held-out"
FIRST_FIT, LOSSES = "fit 0 0", "losses"
"""The first question of a fusion: where routers are fitted by sums, and where they are not."""

Count = Annotated[int, Field(ge=0, le=2**40)]


class TextCounts(UntrustedModel):
    """What a member says of its text before anything is measured.

    Attributes:
        domain: Its domain.
        tokens: Predicted tokens of its calibration blocks.
        blocks: Held-out blocks.
        left_out: Of them, those that lie in known text.
        empty: Of them, those without any word 8-gram.
        grams: Word 8-grams of all held-out blocks.
        own: Of them, those in its own train text.
        union: Those in any train text or samples that it was compared with.
        base: Those in the base's train text.
        kept: Word 8-grams of the held-out blocks that count.
        after: Of these, those in any known text.
        compared: Members whose train text it was compared with, sorted.
        has_base: Whether it was compared with the base's train text.
        claims: What it measured of others' adapters, by their names.
    """

    domain: str
    tokens: Annotated[int, Field(ge=1, le=2**40)]
    blocks: Count
    left_out: Count
    empty: Count
    grams: Count
    own: Count
    union: Count
    base: Count
    kept: Count
    after: Count
    compared: Annotated[list[str], Field(max_length=1_024)] = Field(default=[])
    has_base: bool = False
    claims: Annotated[dict[str, Claim], Field(max_length=1_024)] = Field(default={})

    @model_validator(mode="after")
    def _fit_together(self) -> "TextCounts":
        largest = max(self.own, self.union, self.base, self.kept)
        if self.left_out > self.blocks or self.empty > self.blocks:
            raise ValueError(f"{self.left_out} and {self.empty} of {self.blocks} blocks")
        if largest > self.grams or self.after > self.kept:
            raise ValueError(f"{largest} of {self.grams} 8-grams, {self.after} of {self.kept}")
        return self


@dataclass(frozen=True, eq=False)
class SumQuestion:
    """What all members are asked at once.

    Attributes:
        place: "fit A R", round R of attempt A; "judge A"; "losses", the first where nothing is
            fitted; or "held-out".
        routers: The routers it is about.
        state: Their states, tensors by "router/name".
    """

    place: str
    routers: tuple[str, ...]
    state: Mapping[str, Tensor]

    @property
    def kind(self) -> str:
        """The first word of the place."""
        return self.place.partition(" ")[0]

    @property
    def attempt(self) -> int:
        """A."""
        return int(self.place.split(" ")[1])

    @property
    def is_first(self) -> bool:
        """Whether it opens the fusion, and so asks for everybody's losses, too."""
        return self.place in (FIRST_FIT, LOSSES)

    def of(self, router: str) -> dict[str, Tensor]:
        """The state of one router."""
        return {
            name.removeprefix(f"{router}/"): tensor
            for name, tensor in self.state.items()
            if name.startswith(f"{router}/")
        }


def join_states(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """States of several routers as one, see `SumQuestion.of`."""
    return {f"{r}/{name}": t for r, state in states.items() for name, t in state.items()}


def name_fusion(charter: Charter, contributions: Iterable[str]) -> str:
    """Id of the fusion of these contributions under this charter, 64 hex digits."""
    parts = [charter.identity_hash, charter.amendment.number, sorted(contributions)]
    return hash_bytes(canonical_json(parts))
