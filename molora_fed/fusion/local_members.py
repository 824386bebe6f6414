"""Members of a private fusion in this process, through the calls that a federation makes."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Self

from torch import Tensor

from molora_fed.charter import Charter
from molora_fed.contributions.contributed import Contributed, Entrant
from molora_fed.corpus.overlap import list_shingles
from molora_fed.fusion.held_out import Elsewhere
from molora_fed.fusion.plan import FusionPlan
from molora_fed.fusion.private_answers import FusionMember
from molora_fed.fusion.private_texts import Check
from molora_fed.fusion.sum_questions import SumQuestion, TextCounts
from molora_fed.fusion.sum_rounds import TRIM_SHARE, SumRounds, list_exact
from molora_fed.models.base import Base
from molora_fed.plugins import Plugins
from molora_fed.privacy.intersection import Receiver, Sender
from molora_fed.privacy.sums.local import LocalMaskedSum
from molora_fed.privacy.sums.robust import sum_by_group
from molora_fed.privacy.sums.vectors import Total
from molora_fed.types import Split

__all__ = ["LocalMembers", "drop_text"]


def drop_text(one: Contributed) -> Entrant:
    """A contribution as a coordinator has it that was sent no text."""
    return Entrant(**{each.name: getattr(one, each.name) for each in fields(Entrant)})


@dataclass(eq=False)
class LocalMembers:
    """See `Members`.

    Attributes:
        charter: Says how sums are added up.
        members: By name.
        questions: What was asked, in order.
    """

    charter: Charter
    members: Mapping[str, FusionMember]
    questions: list[SumQuestion] = field(default_factory=list)
    _counts: dict[str, TextCounts] = field(default_factory=dict)
    _recounted: dict[str, TextCounts] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        base: Base,
        charter: Charter,
        contributions: Sequence[Contributed],
        experts: Sequence[Entrant],
        folder: Path,
        *,
        plugins: Plugins,
    ) -> Self:
        """A member for each contribution, with the blocks that it would have sent.

        Args:
            base: The base checkpoint.
            charter: Whose fusion it is.
            contributions: What every member has at home.
            experts: What the coordinator has of all, and sends to all.
            folder: Gets a folder for each member.
            plugins: Where routers, merges and kinds are registered.
        """
        members = {}
        for one in contributions:
            blocks = {Split.CALIBRATION: one.calibration, Split.HELD_OUT: one.held_out}
            members[one.contributor] = FusionMember(
                base,
                charter,
                {split: found for split, found in blocks.items() if found is not None},
                one.train_text,
                experts,
                name=one.contributor,
                folder=folder / one.contributor,
                plugins=plugins,
            )
        return cls(charter, members)

    def begin(self, plan: FusionPlan) -> Mapping[str, TextCounts]:
        """See `Members`."""
        self._counts = {name: member.count() for name, member in sorted(self.members.items())}
        self._recounted = self._compare()
        return self._counts

    def _compare(self) -> dict[str, TextCounts]:
        """Held-out blocks of each member with the text of every other."""
        senders, sets = {}, {}
        for name, member in self.members.items():
            sender = Sender(member.index_known(), secret=secrets.token_bytes(32), fusion="")
            senders[name] = sender
            sets[name] = sender.finish(sender.advance(sender.begin(), sender.total))
        trained = {name for name, member in self.members.items() if member.has_train_text}
        counts = {}
        for name, member in sorted(self.members.items()):
            items = list_shingles(member.held_out, member.tokenizer)
            receiver = Receiver(items, secret=secrets.token_bytes(32), purpose="")
            found = receiver.begin()
            for other in sorted(senders.keys() - {name}):
                reply = senders[other].answer(
                    receiver.query,
                    name,
                    committed=receiver.query.commitment,
                    admit=lambda place, question: None,
                )
                found = receiver.open(found, other, sets[other], reply)
            others = tuple(other for other in found.senders if other in trained)
            counts[name] = member.compare(Elsewhere(receiver.list_known(found), others))
        return counts

    def recount(self) -> Mapping[str, TextCounts]:
        """See `Members`."""
        return self._recounted

    def add_up(self, question: SumQuestion, rounds: SumRounds, check: Check) -> Total:
        """See `Members`."""
        self.questions.append(question)
        layout = rounds.lay_out(question)
        if self.charter.identity.summing == "masked":
            measures = {
                name: partial(self._measure, member, question, rounds)
                for name, member in self.members.items()
            }
            total = LocalMaskedSum(measures)(layout, question.state)
            check(total.parts, total.members)
            return total
        vectors = {
            name: layout.flatten(member.measure(question, rounds), who=name)
            for name, member in self.members.items()
        }
        for name, vector in vectors.items():
            check(layout.unflatten(vector), (name,))
        return sum_by_group(
            vectors,
            layout,
            {name: one.domain for name, one in self._counts.items()},
            {name: float(one.tokens) for name, one in self._counts.items()},
            trim_share=TRIM_SHARE,
            exact=list_exact(layout),
        )

    @staticmethod
    def _measure(
        member: FusionMember, question: SumQuestion, rounds: SumRounds, state: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return member.measure(question, rounds)
