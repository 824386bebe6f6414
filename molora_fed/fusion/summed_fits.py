"""Routers of a fusion fitted by sums, side by side and round by round, then judged the same way."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from molora_fed.errors import RoutingError
from molora_fed.fusion.boundary import NotMeasured
from molora_fed.fusion.collapse import Attempt, GuardedRouter, compare_attempt, keep_best
from molora_fed.fusion.plan import FusionPlan
from molora_fed.fusion.sum_questions import SumQuestion, join_states
from molora_fed.fusion.sum_rounds import SumRounds
from molora_fed.guard import guarded
from molora_fed.privacy.sums.vectors import Total
from molora_fed.routing.contract import OutputRouter
from molora_fed.routing.summed import Finished, SummedFit, SummedState

__all__ = ["SummedFits"]

_Ask = Callable[[SumQuestion], Total]


class SummedFits:
    """See `RouterFits`.

    Args:
        plan: The fusion's.
        rounds: Of this fusion.
        seed: Of the routers.
        missing: Receives compared routers that cannot be fitted by sums.

    Raises:
        RoutingError: If the published router cannot.
    """

    def __init__(
        self, plan: FusionPlan, rounds: SumRounds, seed: int, missing: NotMeasured
    ) -> None:
        self._plan = plan
        self._rounds = rounds
        self._seed = seed
        self._fits: dict[str, SummedFit] = {}
        self._states: dict[str, SummedState | Finished] = {}
        for name in plan.routers:
            with missing.skipping("router", name, unless=name == plan.router):
                fit = rounds.plan_fit(name, 0)
                with guarded(plan.router_entry(name), "start"):
                    self._states[name] = fit.start()
                self._fits[name] = fit

    @property
    def num_rounds(self) -> int:
        """See `RouterFits`; the last one judges."""
        return max((1, *(fit.rounds for fit in self._fits.values()))) + 1

    def begin(self) -> SumQuestion:
        """See `RouterFits`."""
        return self._question(self._rounds.first, self._states)

    def _question(self, place: str, states: Mapping[str, SummedState | Finished]) -> SumQuestion:
        sent = {n: self._fits[n].send(s) for n, s in states.items() if not isinstance(s, Finished)}
        return SumQuestion(place, tuple(sent), join_states(sent))

    def finish(self, first: SumQuestion, total: Total, ask: _Ask) -> dict[str, GuardedRouter[Any]]:
        """See `RouterFits`."""
        rules = self._plan.charter.amendment.fusion
        fitted: dict[str, list[OutputRouter]] = {name: [] for name in self._fits}
        attempts: dict[str, list[Attempt]] = {name: [] for name in self._fits}
        running = self._advance_all(first, total, dict(self._states), 0)
        turn = 1
        for attempt in range(rules.restarts + 1):
            tensors = self._run_rounds(attempt, turn, running, ask)
            for name, judged in self._judge(attempt, tensors, rules.collapse_nats, ask).items():
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
            running, turn = {name: self._fits[name].start() for name in again}, 0
        return {n: keep_best(fitted[n], attempts[n]) for n in fitted if attempts[n]}

    def _run_rounds(
        self, attempt: int, turn: int, states: Mapping[str, SummedState | Finished], ask: _Ask
    ) -> dict[str, Mapping[str, Tensor]]:
        """Rounds until every fit has ended, from a turn on; what each learned."""
        running = dict(states)
        while any(not isinstance(state, Finished) for state in running.values()):
            question = self._question(f"fit {attempt} {turn}", running)
            running = self._advance_all(question, ask(question), running, turn)
            turn += 1
        return {n: state.tensors for n, state in running.items() if isinstance(state, Finished)}

    def _advance_all(
        self,
        question: SumQuestion,
        total: Total,
        states: Mapping[str, SummedState | Finished],
        turn: int,
    ) -> dict[str, SummedState | Finished]:
        asked = {n: self._advance(n, states[n], total, turn) for n in question.routers}
        return {**states, **asked}

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
        with guarded(self._plan.router_entry(name), "advance"):
            after = self._fits[name].advance(state, own)
        if turn + 1 >= self._fits[name].rounds and not isinstance(after, Finished):
            raise RoutingError(
                f"Cannot fit router '{name}' by sums: expected an end after "
                f"{self._fits[name].rounds} rounds, got another state. Correct its `rounds` or "
                "`advance`."
            )
        return after

    def _judge(
        self,
        attempt: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        collapse_nats: float,
        ask: _Ask,
    ) -> dict[str, Attempt]:
        """How well each router does on calibration text, by domain."""
        question = SumQuestion(f"judge {attempt}", tuple(tensors), join_states(tensors))
        total, domains = ask(question), self._rounds.domains
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
