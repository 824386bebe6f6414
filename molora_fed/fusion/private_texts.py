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
from molora_fed.errors import RoutingError
from molora_fed.evaluation.summed_report import SummedEvaluation, compose_loss_matrix
from molora_fed.forecasting.records import FAILED
from molora_fed.fusion.boundary import NotMeasured
from molora_fed.fusion.collapse import Attempt, GuardedRouter, compare_attempt, keep_best
from molora_fed.fusion.plan import FusionPlan
from molora_fed.fusion.sum_rounds import (
    HELD_OUT,
    SumQuestion,
    SumRounds,
    TextCounts,
    join_states,
)
from molora_fed.fusion.texts import Control
from molora_fed.guard import guarded
from molora_fed.models.base import Base
from molora_fed.privacy.sums.vectors import Total
from molora_fed.routing.contract import OutputRouter
from molora_fed.routing.summed import Finished, SummedFit, SummedState
from molora_fed.types import LossMatrix, Progress

__all__ = ["Members", "PrivateTexts"]

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
        counts = self.members.begin(plan)
        rounds = SumRounds(plan, base.model.config.hidden_size, counts, seed=seed)
        return _PrivateRun(plan, self.members, counts, rounds, seed, missing, progress)


class _PrivateRun:
    """See `TextsRun`."""

    def __init__(
        self,
        plan: FusionPlan,
        members: Members,
        counts: Mapping[str, TextCounts],
        rounds: SumRounds,
        seed: int,
        missing: NotMeasured,
        progress: Progress | None,
    ) -> None:
        self._plan = plan
        self._members = members
        self._counts = counts
        self._rounds = rounds
        self._seed = seed
        self._missing = missing
        self._progress = progress
        self._fits: dict[str, SummedFit] = {}
        self._states: dict[str, SummedState | Finished] = {}
        self._asked = 0
        self._first: tuple[SumQuestion, Total] | None = None
        self._begin_fits()

    def _begin_fits(self) -> None:
        """Find out who can be fitted by sums, and where each begins."""
        for name in self._plan.routers:
            with self._missing.skipping("router", name, unless=name == self._plan.router):
                fit = self._rounds.plan_fit(name, 0)
                with guarded(self._plan.plugins.routers.entry(name), "start"):
                    self._states[name] = fit.start()
                self._fits[name] = fit

    def _ask(self, question: SumQuestion) -> Total:
        def check(parts: Mapping[str, Tensor], members: Sequence[str]) -> None:
            self._rounds.check(question, parts, members)

        total = self._members.add_up(question, self._rounds, check)
        self._asked += 1
        if self._progress is not None:
            self._progress(self._asked, self._count_rounds())
        return total

    def _count_rounds(self) -> int:
        """Message rounds of the whole fusion, where no router is fitted twice."""
        return max((1, *(fit.rounds for fit in self._fits.values()))) + 2

    def _ask_first(self) -> tuple[SumQuestion, Total]:
        """The first round, asked once; not a cached property, whose lock all instances share."""
        if self._first is None:
            question = self._question("fit 0 0", self._states)
            self._first = question, self._ask(question)
        return self._first

    def _question(self, place: str, states: Mapping[str, SummedState | Finished]) -> SumQuestion:
        sent = {n: self._fits[n].send(s) for n, s in states.items() if not isinstance(s, Finished)}
        return SumQuestion(place, tuple(sent), join_states(sent))

    def measure_matrix(self) -> LossMatrix:
        """See `TextsRun`; it is asked with the first round of the fits."""
        _, total = self._ask_first()
        parts = self._rounds.unpack_alone(total.parts, total.members)
        return compose_loss_matrix(parts, self._plan.own_domain)

    def fit(self) -> tuple[dict[str, GuardedRouter[Any]], dict[str, dict[str, Any]]]:
        """Fit all routers side by side, round by round, and judge them; see `TextsRun`."""
        rules = self._plan.charter.amendment.fusion
        fitted: dict[str, list[OutputRouter]] = {name: [] for name in self._fits}
        attempts: dict[str, list[Attempt]] = {name: [] for name in self._fits}
        running = dict(self._states)
        for attempt in range(rules.restarts + 1):
            tensors = self._run_rounds(attempt, running)
            for name, judged in self._judge(attempt, tensors, rules.collapse_nats).items():
                fitted[name].append(self._rounds.build_router(name, tensors[name]))
                attempts[name].append(judged)
            again = [
                name
                for name in tensors
                if attempts[name][-1].collapsed and self._fits[name].uses_seed
            ]
            if not again or attempt == rules.restarts:
                break
            self._fits |= {name: self._rounds.plan_fit(name, attempt + 1) for name in again}
            running = {name: self._fits[name].start() for name in again}
        found = {n: keep_best(fitted[n], attempts[n]) for n in fitted if attempts[n]}
        return found, {}

    def _run_rounds(
        self, attempt: int, states: Mapping[str, SummedState | Finished]
    ) -> dict[str, Mapping[str, Tensor]]:
        """Rounds until every fit has ended; what each learned."""
        running = dict(states)
        turn = 0
        while (attempt, turn) == (0, 0) or any(
            not isinstance(state, Finished) for state in running.values()
        ):
            if (attempt, turn) == (0, 0):
                question, total = self._ask_first()
            else:
                question = self._question(f"fit {attempt} {turn}", running)
                total = self._ask(question)
            for name in question.routers:
                running[name] = self._advance(name, running[name], total, turn)
            turn += 1
        return {n: state.tensors for n, state in running.items() if isinstance(state, Finished)}

    def _advance(
        self, name: str, state: SummedState | Finished, total: Total, turn: int
    ) -> SummedState | Finished:
        if isinstance(state, Finished):
            return state
        prefix = f"{name}/"
        own = {
            part.removeprefix(prefix): tensor
            for part, tensor in total.parts.items()
            if part.startswith(prefix)
        }
        with guarded(self._plan.plugins.routers.entry(name), "advance"):
            after = self._fits[name].advance(state, own)
        if turn + 1 >= self._fits[name].rounds and not isinstance(after, Finished):
            raise RoutingError(
                f"Cannot fit router '{name}' by sums: expected an end after "
                f"{self._fits[name].rounds} rounds, got another state. Correct its `rounds` or "
                "`advance`."
            )
        return after

    def _judge(
        self, attempt: int, tensors: Mapping[str, Mapping[str, Tensor]], collapse_nats: float
    ) -> dict[str, Attempt]:
        """How well each router does on calibration text, by domain."""
        question = SumQuestion(f"judge {attempt}", tuple(tensors), join_states(tensors))
        total, domains = self._ask(question), self._rounds.domains
        found = {}
        for name in tensors:
            experts = total.parts[f"{name}/experts"].amin(dim=1).tolist()
            losses = total.parts[f"{name}/router"].tolist()
            found[name] = compare_attempt(
                dict(zip(domains, losses, strict=True)),
                self._seed + attempt,
                dict(zip(domains, experts, strict=True)),
                collapse_nats,
            )
        return found

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
        return replace(found, members={domain: members[domain] for domain in found.by_domain})

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
