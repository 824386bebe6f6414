"""A fusion's texts where they stay with their owners: members are asked for sums, in rounds.

Every method here asks; what is asked again after a kill is the same question, so whoever answers
for the members keeps answers and gives them again.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from molora_fed.contributions.contributed import Entrant
from molora_fed.corpus.overlap import MAX_BLOCK_OVERLAP
from molora_fed.corpus.report import MAX_CONTAMINATION
from molora_fed.evaluation.summed_report import SummedEvaluation, compose_loss_matrix
from molora_fed.forecasting.records import FAILED
from molora_fed.fusion.boundary import NotMeasured
from molora_fed.fusion.collapse import GuardedRouter
from molora_fed.fusion.plan import FusionPlan
from molora_fed.fusion.published_fits import PublishedFits
from molora_fed.fusion.published_rounds import PublishedRounds, plan_rounds
from molora_fed.fusion.shortlist import describe_shortlist
from molora_fed.fusion.sum_questions import HELD_OUT, SumQuestion, TextCounts, join_states
from molora_fed.fusion.sum_rounds import SumRounds
from molora_fed.fusion.summed_fits import SummedFits
from molora_fed.fusion.texts import Control
from molora_fed.models.base import Base
from molora_fed.privacy.sums.vectors import Total
from molora_fed.routing.contract import OutputRouter
from molora_fed.types import LossMatrix, Progress

__all__ = ["Members", "PrivateTexts"]

Ask = Callable[[SumQuestion], Total]
"""Asks all members, and adds up what they answer."""
Check = Callable[[Mapping[str, Tensor], Sequence[str]], None]
"""Refuses, by a SumError, parts of a vector or a total that these members could not have given."""


class Members(Protocol):
    """Whoever asks the members of a fusion, and keeps what they answered."""

    def begin(self, plan: FusionPlan) -> Mapping[str, TextCounts]:
        """Send everybody all experts; counts of each member's text by its name.

        Raises:
            MoloraError: If too few can take part.
        """
        ...

    def recount(self) -> Mapping[str, TextCounts]:
        """Counts once held-out blocks were compared with all members' text.

        They are those of `begin` of members for whom that failed. Asked for last.
        """
        ...

    def add_up(self, question: SumQuestion, rounds: SumRounds, check: Check) -> Total:
        """The sum of what all members answer, the charter's way.

        Args:
            question: What they are asked.
            rounds: How they answer.
            check: Refuses a member's vector where single vectors are seen, a total elsewhere.

        Raises:
            SumError: If too few answer.
        """
        ...


@dataclass(frozen=True, eq=False)
class PrivateTexts:
    """Texts that stay with their contributors; see `FusionTexts`.

    Attributes:
        contributions: Of whom.
        members: Asks them.
        controls: None can be measured: they are no experts.
    """

    contributions: Sequence[Entrant]
    members: Members
    controls: Mapping[str, Control] = field(default_factory=dict)

    def open(
        self,
        base: Base,
        plan: FusionPlan,
        folder: Path,
        *,
        seed: int,
        missing: NotMeasured,
        progress: Progress | None,
    ) -> "_PrivateRun":
        """Send the experts, and hear what each member has; see `FusionTexts`."""
        counts, width = self.members.begin(plan), base.model.config.hidden_size
        rounds = plan_rounds(plan, width, counts, seed=seed)
        fits: RouterFits = (
            PublishedFits(plan, rounds, missing)
            if isinstance(rounds, PublishedRounds)
            else SummedFits(plan, rounds, seed, missing)
        )
        return _PrivateRun(plan, self.members, counts, rounds, fits, missing, progress)


class RouterFits(Protocol):
    """How the routers of a fusion come about, between its first question and the held-out one."""

    @property
    def num_rounds(self) -> int:
        """Message rounds up to the held-out one, where no router is fitted twice."""
        ...

    def begin(self) -> SumQuestion:
        """The first question, which brings everybody's losses, too."""
        ...

    def finish(self, first: SumQuestion, total: Total, ask: Ask) -> dict[str, GuardedRouter[Any]]:
        """The routers, under the guard where there is one.

        Args:
            first: The first question.
            total: What was answered.
            ask: Asks further ones.
        """
        ...


class _PrivateRun:
    """See `TextsRun`."""

    def __init__(
        self,
        plan: FusionPlan,
        members: Members,
        counts: Mapping[str, TextCounts],
        rounds: SumRounds,
        fits: RouterFits,
        missing: NotMeasured,
        progress: Progress | None,
    ) -> None:
        self._plan = plan
        self._members = members
        self._counts = counts
        self._rounds = rounds
        self._fits = fits
        self._missing = missing
        self._progress = progress
        self._asked = 0
        self._first: tuple[SumQuestion, Total] | None = None

    def _ask(self, question: SumQuestion) -> Total:
        def check(parts: Mapping[str, Tensor], members: Sequence[str]) -> None:
            self._rounds.check(question, parts, members)

        total = self._members.add_up(question, self._rounds, check)
        self._asked += 1
        if self._progress is not None:
            self._progress(self._asked, self._fits.num_rounds + 1)
        return total

    def _ask_first(self) -> tuple[SumQuestion, Total]:
        """The first round, asked once; not a cached property, whose lock all instances share."""
        if self._first is None:
            question = self._fits.begin()
            self._first = question, self._ask(question)
        return self._first

    def measure_matrix(self) -> LossMatrix:
        """See `TextsRun`; it is asked with the first round of the fits."""
        _, total = self._ask_first()
        parts = self._rounds.unpack_alone(total.parts, total.members)
        return compose_loss_matrix(parts, self._plan.own_domain)

    def fit(self) -> tuple[dict[str, GuardedRouter[Any]], dict[str, dict[str, Any]]]:
        """See `TextsRun`."""
        return self._fits.finish(*self._ask_first(), self._ask), {}

    def prepare_held_out(self) -> None:
        """Nothing: each member chooses its blocks and measures merges when it evaluates."""

    def evaluate(
        self, routers: Mapping[str, OutputRouter], needed: frozenset[str]
    ) -> SummedEvaluation:
        """Ask for held-out figures, once; see `TextsRun`."""
        names = tuple(routers)
        states = {name: routers[name].state_tensors() for name in names}
        question = SumQuestion(HELD_OUT, names, join_states(states))
        total = self._ask(question)
        said = self._rounds.unpack_held_out(total.parts, names, total.members)
        found = SummedEvaluation.add(self._rounds.compare(names), said)
        for name in sorted(self._counts.keys() - set(total.members)):
            self._missing.add("member", name, f"{FAILED}not in the held-out figures: it had left")
        members = Counter(self._counts[name].domain for name in total.members)
        found = replace(found, members={domain: members[domain] for domain in found.by_domain})
        costs = self._rounds.unpack_cost(total.parts, names, total.members)
        if not costs:
            return found
        said_of = describe_shortlist(self._plan, costs, self._counts, total.members)
        return replace(found, shortlist=said_of)

    def describe(self) -> dict[str, Any]:
        """See `TextsRun`; of texts that stay where they are there are no fingerprints."""
        counts = self._members.recount()
        missed = {
            name: absent
            for name, one in counts.items()
            if (absent := sorted(counts.keys() - set(one.compared)))
        }
        absent = sorted({name for names in missed.values() for name in names})
        return {
            "overlap": {
                "limit": MAX_CONTAMINATION,
                "max_block_overlap": MAX_BLOCK_OVERLAP,
                "compared": {
                    "train": sorted(counts.keys() - set(absent)),
                    "samples": True,
                    "base": all(one.has_base for one in counts.values()),
                },
                "absent": absent,
                **({"not_compared": missed} if missed else {}),
                "domains": {d: _describe_overlap(counts, d) for d in self._rounds.domains},
            },
            "corpus": {
                name: {
                    "domain": one.domain,
                    "calibration": {"tokens": one.tokens},
                    "held_out": {"blocks": one.blocks},
                }
                for name, one in counts.items()
            },
            "claims": {
                whom: {
                    name: one.claims[whom].to_json(one.domain)
                    for name, one in counts.items()
                    if whom in one.claims
                }
                for whom in counts
            },
            "calibration": {},
            "held_out": {},
            "held_out_kept": {},
        }


def _describe_overlap(counts: Mapping[str, TextCounts], domain: str) -> dict[str, Any]:
    own = [one for one in counts.values() if one.domain == domain]
    grams, kept = (max(1, sum(getattr(c, n) for c in own)) for n in ("grams", "kept"))
    return {
        **{n: sum(getattr(c, n) for c in own) / grams for n in ("own", "union")},
        "base": sum(c.base for c in own) / grams if all(c.has_base for c in own) else None,
        **{n: sum(getattr(c, n) for c in own) for n in ("blocks", "left_out", "empty")},
        "after": sum(one.after for one in own) / kept,
    }
