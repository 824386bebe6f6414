"""What a fusion asks of members whose texts stay with them, as both ends derive it.

A question names its place in the fusion and brings a state; everything else, what is measured, in
which shapes and within which bounds, follows from the charter, the experts and the members' counts.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import torch
from torch import Tensor

from molora_fed.errors import MoloraError, PluginError, RoutingError, SumError
from molora_fed.evaluation.composition import name_specialist
from molora_fed.evaluation.moments import Moments
from molora_fed.evaluation.summed import Compared, MemberSums
from molora_fed.fusion.boundary import label_merge
from molora_fed.fusion.collapse import SummedJudgement
from molora_fed.fusion.plan import FusionPlan
from molora_fed.fusion.shortlist import COST_BLOCKS
from molora_fed.fusion.sum_questions import FIRST_FIT, HELD_OUT, SumQuestion, TextCounts
from molora_fed.guard import guarded
from molora_fed.privacy.sums.vectors import Part, VectorLayout
from molora_fed.routing.contract import OutputRouter
from molora_fed.routing.summed import FitSetting, SumEntry, SummedFit, plan_summed_fit
from molora_fed.storage.untrusted import clean
from molora_fed.types import BASE_EXPERT

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = [
    "ALONE",
    "GATES",
    "MOMENTS",
    "SHORTLIST",
    "SUM_BITS",
    "TRIM_SHARE",
    "SumRounds",
    "list_exact",
]

SUM_BITS: Final = 64
"""Of the words that masked sums are added up in."""
TRIM_SHARE = 0.2
"""Of a domain's members, cut at each end of every coordinate of a robust sum."""
ALONE, MOMENTS, GATES, SHORTLIST = "alone", "moments", "gates", "shortlist"
_LARGEST_LOSS = 32.0  # nats a token in a document's mean; larger sums are clipped
_SLACK = 2.0**-54  # of a bound: what adding up in fixed point may take from a square
_ROUNDED = 1e-3  # of a count that was added up in fixed point


def list_exact(layout: VectorLayout) -> frozenset[str]:
    """Parts that hold each document's figures once: no share of them can be cut off."""
    names, once = (part.name for part in layout.parts), (ALONE, MOMENTS, GATES, SHORTLIST)
    return frozenset(n for n in names if n.split(".")[0] in once)


class SumRounds:
    """Layouts and measurements of all questions of one fusion.

    Args:
        plan: The fusion's.
        hidden_size: D of the base.
        counts: What each member has, by its name.
        seed: Of the routers.

    Attributes:
        domains: Domains of the members, sorted; C of them.
        weights: Weight of a predicted token by domain; over all members they sum to 1.
        compared: What is measured on held-out text.
        first: Place of the first question.
        probed: Kind of question before whose answer routers are probed.
        hidden_size: D.
    """

    first: ClassVar[str] = FIRST_FIT
    probed: ClassVar[str] = "judge"

    def __init__(
        self, plan: FusionPlan, hidden_size: int, counts: Mapping[str, TextCounts], *, seed: int
    ) -> None:
        self._plan = plan
        self._counts = counts
        self.hidden_size = hidden_size
        self._seed = seed
        self._experts = tuple(expert.name for expert in plan.experts)
        self.domains = tuple(sorted({one.domain for one in counts.values()}))
        tokens = {d: sum(c.tokens for c in counts.values() if c.domain == d) for d in self.domains}
        self._tokens = sum(tokens.values())
        self.weights = {d: 1 / (len(tokens) * max(1, count)) for d, count in tokens.items()}
        self._alone = ("base", *(name_specialist(n) for n in self._experts if n != BASE_EXPERT))
        samples, size = plan.charter.amendment.samples, plan.charter.identity.corpus.block_size
        self._most = {
            ALONE: samples.calibration * (size - 1),
            HELD_OUT: samples.held_out * (size - 1),
            SHORTLIST: COST_BLOCKS * (size - 1),
        }

    def plan_fit(self, name: str, attempt: int) -> SummedFit:
        """How a router is fitted.

        Raises:
            PluginError: If its plugin fails.
            RoutingError: If it cannot be fitted by sums.
        """
        router, options = self._plan.routers[name]
        with guarded(self._plan.router_entry(name), "by_sums"):
            return plan_summed_fit(router, self._set(options, attempt))

    def plan_judgement(
        self, name: str, attempt: int, tensors: Mapping[str, Tensor]
    ) -> SummedJudgement:
        """How a fitted router is judged on calibration text."""
        router, options = self._plan.routers[name]
        return SummedJudgement(self._set(options, attempt), router, tensors)

    def build_router(self, name: str, tensors: Mapping[str, Tensor]) -> OutputRouter:
        """A router with what it learned."""
        router, options = self._plan.routers[name]
        return router(len(self._experts), options, tensors)

    def compare(self, routers: Sequence[str]) -> Compared:
        """What is measured on held-out text."""
        merges = [label_merge(one) for one in self._plan.charter.amendment.fusion.merges]
        return Compared(self._experts, tuple(routers), tuple(dict.fromkeys(merges)))

    def lay_out(self, question: SumQuestion) -> VectorLayout:
        """Parts of the vector that answers a question.

        Raises:
            RoutingError: If the question names an unknown router, states that do not fit, or asks
                for more numbers than its place allows for.
        """
        self._check_routers(question.routers)
        limit = self.limits.get(question.place)
        if limit is None:
            raise RoutingError(
                f"Cannot answer '{clean(question.place, 80)}': expected a place of a fusion under "
                "the charter, got another. Ask the coordinator."
            )
        try:
            layout = self._lay_out(question)
        except MoloraError:
            raise
        except Exception as error:  # whatever a state from outside does to the code of a router
            raise RoutingError(
                f"Cannot answer '{question.place}': expected states that fit the charter's "
                f"routers, got {type(error).__name__} on reading them. Ask the coordinator."
            ) from error
        if layout.length > limit:
            raise RoutingError(
                f"Cannot answer '{question.place}': expected a question for at most {limit:,} "
                f"numbers, as the charter says, got one for {layout.length:,}. Ask the coordinator."
            )
        return layout

    def _lay_out(self, question: SumQuestion) -> VectorLayout:
        entries: dict[str, SumEntry] = {}
        if question.kind == HELD_OUT:
            compared = self.compare(question.routers)
            entries |= self._lay_out_moments(MOMENTS, compared.columns, HELD_OUT)
            shape = (len(self.domains), len(question.routers), len(self._experts))
            entries[GATES] = SumEntry(shape, float(self._most[HELD_OUT]))
            if self._plan.shortlist:
                entries |= self._lay_out_moments(SHORTLIST, question.routers, SHORTLIST)
        else:
            for name, task in self.list_tasks(question):
                for entry, described in task.entries(question.of(name)).items():
                    entries[f"{name}/{entry}"] = described
            if question.is_first:
                entries |= self._lay_out_moments(ALONE, self._alone, ALONE)
        return VectorLayout(tuple(Part(n, e.shape, e.bound) for n, e in entries.items() if e.size))

    @cached_property
    def limits(self) -> dict[str, int]:
        """Most numbers of an answer by place, in the order of a fusion; each is asked for once."""
        found, routers = self.limit_fits()
        alone = self._lay_out_moments(ALONE, self._alone, ALONE).values()
        first = found.pop(self.first, 0) + sum(entry.size for entry in alone)
        held_out = self._lay_out(SumQuestion(HELD_OUT, routers, {})).length
        return {self.first: first, **found, HELD_OUT: held_out}

    def limit_fits(self) -> tuple[dict[str, int], tuple[str, ...]]:
        """Most numbers of what fits and judges by place; and the routers that are evaluated."""
        fits: dict[str, tuple[int, ...]] = {}
        again: set[str] = set()
        for name in self._plan.routers:
            with suppress(PluginError, RoutingError):
                fit = self.plan_fit(name, 0)
                with guarded(self._plan.router_entry(name), "limit_numbers"):
                    fits[name] = fit.limit_numbers()
                again |= {name} if fit.uses_seed else set()
        domains, experts = len(self.domains), len(self._experts)
        found: dict[str, int] = {}
        for attempt in range(self._plan.charter.amendment.fusion.restarts + 1):
            fitted = {name: fits[name] for name in fits if attempt == 0 or name in again}
            for turn in range(max(map(len, fitted.values()), default=0)):
                asked = [numbers[turn] for numbers in fitted.values() if turn < len(numbers)]
                found[f"fit {attempt} {turn}"] = sum(asked)
            if fitted:
                found[f"judge {attempt}"] = len(fitted) * domains * (1 + experts)
        return found, tuple(fits)

    def _check_routers(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self._plan.routers]
        if unknown:
            raise RoutingError(
                f"Cannot answer about router '{clean(unknown[0], 80)}': expected one of the "
                f"charter's, {', '.join(self._plan.routers)}, got that one. Ask the coordinator."
            )

    def list_tasks(self, question: SumQuestion) -> Iterator[tuple[str, SummedFit]]:
        """The fits or judgements of a question, by router."""
        for name in question.routers:
            if question.kind == "fit":
                yield name, self.plan_fit(name, question.attempt)
            else:
                yield name, self.plan_judgement(name, question.attempt, question.of(name))

    def measure(self, question: SumQuestion, bank: "CalibrationBank") -> dict[str, Tensor]:
        """A member's sums for the routers of a question about calibration text."""
        found: dict[str, Tensor] = {}
        for name, task in self.list_tasks(question):
            with guarded(self._plan.router_entry(name), "measure"):
                sums = task.measure(bank, question.of(name), self.weights)
            found |= {f"{name}/{entry}": tensor for entry, tensor in sums.items()}
        return found

    def pack_alone(self, moments: Moments, domain: str) -> dict[str, Tensor]:
        """Calibration losses of a member of a domain as parts of its vector."""
        return self._pack(ALONE, moments, domain)

    def pack_held_out(self, said: MemberSums, routers: Sequence[str]) -> dict[str, Tensor]:
        """Held-out figures of a member as parts of its vector."""
        gates = torch.zeros(len(self.domains), len(routers), len(self._experts)).double()
        rows = [torch.tensor(said.gates[name], dtype=torch.float64) for name in routers]
        gates[self.domains.index(said.domain)] = torch.stack(rows)
        return {**self._pack(MOMENTS, said.moments, said.domain), GATES: gates}

    def count_cost(self) -> int:
        """Most numbers of a held-out answer that say what shortlists cost."""
        _, routers = self.limit_fits()
        entries = self._lay_out_moments(SHORTLIST, routers, SHORTLIST).values()
        return sum(entry.size for entry in entries) if self._plan.shortlist else 0

    def pack_cost(self, cost: Moments, domain: str) -> dict[str, Tensor]:
        """What a member's shortlist costs as parts of its vector."""
        return self._pack(SHORTLIST, cost, domain)

    def unpack_alone(
        self, parts: Mapping[str, Tensor], members: Iterable[str]
    ) -> list[tuple[str, Moments]]:
        """Calibration losses by domain, of a total or of one member.

        Args:
            parts: Of vectors or totals.
            members: Whose they are.

        Raises:
            SumError: If no text of these members could have these figures.
        """
        found = []
        for domain, own in self._group(members).items():
            who = self._describe(domain, own)
            moments = self._read(ALONE, parts, domain, self._alone, who)
            tokens = sum(self._counts[name].tokens for name in own)
            if moments.tokens != tokens:
                raise SumError(
                    f"Cannot use the figures of '{who}': expected {tokens} tokens as counted "
                    f"before, got {moments.tokens:.0f}. Run the same molora-fed version everywhere."
                )
            found.append((domain, moments))
        return found

    def unpack_held_out(
        self, parts: Mapping[str, Tensor], routers: Sequence[str], members: Iterable[str]
    ) -> list[MemberSums]:
        """Held-out figures by domain, of a total or of one member; see `unpack_alone`.

        Raises:
            SumError: If no text could have these figures, or they are of too few documents.
        """
        compared, found = self.compare(routers), []
        for domain, own in self._group(members).items():
            who = self._describe(domain, own)
            moments = self._read(MOMENTS, parts, domain, compared.columns, who)
            rows = parts[GATES][self.domains.index(domain)].tolist()
            gates = dict(zip(routers, rows, strict=True))
            said = {"moments": moments.to_json(), "gates": gates}
            found.append(MemberSums.from_json(said, compared, domain=domain, who=who))
        return found

    def unpack_cost(
        self, parts: Mapping[str, Tensor], routers: Sequence[str], members: Iterable[str]
    ) -> list[tuple[str, Moments]]:
        """What shortlists cost by domain; nothing where there is none. See `unpack_alone`."""
        found = []
        for domain, own in self._group(members).items() if self._plan.shortlist else ():
            who = self._describe(domain, own)
            moments = self._read(SHORTLIST, parts, domain, routers, who)
            most = self._most[SHORTLIST] * len(own)
            if moments.tokens > most:
                raise SumError(
                    f"Cannot use the figures of '{who}': expected a shortlist's cost on {most} "
                    f"tokens at most, got {moments.tokens:.0f}. Run the same molora-fed version "
                    "everywhere."
                )
            found.append((domain, moments))
        return found

    def check(
        self, question: SumQuestion, parts: Mapping[str, Tensor], members: Sequence[str]
    ) -> None:
        """Refuse figures that no text of these members could have.

        Args:
            question: What was asked.
            parts: Of a vector or a total.
            members: Whose it is.

        Raises:
            SumError: Saying why.
        """
        if question.kind == HELD_OUT:
            self.unpack_held_out(parts, question.routers, members)
            self.unpack_cost(parts, question.routers, members)
        elif question.is_first:
            self.unpack_alone(parts, members)
        elif question.kind == "judge":
            for domain, own in self._group(members).items():
                share = sum(self._counts[name].tokens for name in own) * self.weights[domain]
                most = share * len(self.domains) * _LARGEST_LOSS
                index = self.domains.index(domain)
                for router in question.routers:
                    loss = float(parts[f"{router}/router"][index])
                    if not 0 < loss <= most:
                        raise SumError(
                            f"Cannot use the figures of '{self._describe(domain, own)}': expected "
                            f"a loss of '{router}' of at most {_LARGEST_LOSS:g} nats, got "
                            f"{loss:.4g}. Run the same molora-fed version everywhere."
                        )

    def _group(self, members: Iterable[str]) -> dict[str, list[str]]:
        """Members by domain."""
        found: dict[str, list[str]] = {}
        for name in sorted(members):
            found.setdefault(self._counts[name].domain, []).append(name)
        return dict(sorted(found.items()))

    @staticmethod
    def _describe(domain: str, members: Sequence[str]) -> str:
        """Whose a domain's figures are."""
        return members[0] if len(members) == 1 else f"{len(members)} members of {domain}"

    def _set(self, options: Any, attempt: int) -> FitSetting:
        return FitSetting(
            expert_names=self._experts,
            domains=self.domains,
            hidden_size=self.hidden_size,
            tokens=self._tokens,
            mixture=self._plan.bank["mixture"],
            options=options,
            seed=self._seed + attempt,
            adapters=self._plan.adapters.take(self._experts),
            carried={expert.name: expert.carried for expert in self._plan.experts},
        )

    def _lay_out_moments(self, name: str, columns: Sequence[str], text: str) -> dict[str, SumEntry]:
        """Clusters, tokens n, sum n^2; then sum x, sum x n and sum x^2 of each column."""
        domains, most = len(self.domains), float(self._most[text])
        largest = most * _LARGEST_LOSS
        bounds = {"n": most, "nn": most**2, "x": largest, "xn": largest * most, "xx": largest**2}
        shapes = {"n": (domains, 2), "nn": (domains, 1)}
        plain = (domains, len(columns))
        return {f"{name}.{k}": SumEntry(shapes.get(k, plain), b) for k, b in bounds.items()}

    def _pack(self, name: str, moments: Moments, domain: str) -> dict[str, Tensor]:
        sums = np.array(list(moments.columns.values()))  # sum x, sum x^2, sum x n
        rows = {
            "n": np.array([moments.clusters, moments.tokens], dtype=np.float64),
            "nn": np.array([moments.squares]),
            "x": sums[:, 0],
            "xn": sums[:, 2],
            "xx": sums[:, 1],
        }
        found = {}
        for key, row in rows.items():
            tensor = torch.zeros(len(self.domains), len(row), dtype=torch.float64)
            tensor[self.domains.index(domain)] = torch.as_tensor(row)
            found[f"{name}.{key}"] = tensor
        return found

    def _read(
        self,
        name: str,
        parts: Mapping[str, Tensor],
        domain: str,
        columns: Sequence[str],
        who: str,
    ) -> Moments:
        index = self.domains.index(domain)
        rows = {key: parts[f"{name}.{key}"][index].tolist() for key in ("n", "nn", "x", "xn", "xx")}
        counts = [*rows["n"], *rows["nn"]]
        whole = [round(count) for count in counts]
        if any(
            abs(a - b) > _ROUNDED * max(1.0, abs(b)) for a, b in zip(counts, whole, strict=True)
        ):
            raise SumError(
                f"Cannot use the figures of '{who}': expected whole numbers of documents and "
                f"tokens, got {counts}. Run the same molora-fed version everywhere."
            )
        # Rounding must not make a square smaller than what it is the square of.
        slack = (self._most[HELD_OUT if name == MOMENTS else name] * _LARGEST_LOSS) ** 2 * _SLACK
        sums = zip(rows["x"], (xx + slack for xx in rows["xx"]), rows["xn"], strict=True)
        said = Moments(whole[0], whole[1], whole[2], dict(zip(columns, sums, strict=True)))
        return Moments.from_json(said.to_json(), columns, who=who)
