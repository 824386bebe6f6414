"""Members of a private fusion, asked over the exchange of folders; see `Members`.

Every total is kept as soon as it is opened, and what went into it is deleted: a run that was killed
asks for nothing twice that it knows, and goes on in the middle of a masked sum.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from molora_fed.charter import MIN_MEMBERS, Charter
from molora_fed.contributions.manifest import Contribution
from molora_fed.errors import ExpertError, FederationError, SumError
from molora_fed.federation.exchange import ANSWER_FILE, Exchange
from molora_fed.federation.messages import Shipment
from molora_fed.federation.overlap_carrier import OverlapCarrier
from molora_fed.federation.overlap_letters import OFFER_BYTES
from molora_fed.federation.sum_letters import (
    AgainAsked,
    ExpertsAsked,
    PhaseAsked,
    SumAsked,
    read_counts,
    read_message,
    read_tensors,
    read_vector,
    save_again,
    save_experts,
    save_phase,
    save_sum,
    write_tensors,
)
from molora_fed.fusion.claims import draw_measurers, find_disagreement, list_drawn
from molora_fed.fusion.plan import FusionPlan
from molora_fed.fusion.private_texts import Check
from molora_fed.fusion.sum_questions import SumQuestion, TextCounts, name_fusion
from molora_fed.fusion.sum_rounds import SUM_BITS, TRIM_SHARE, SumRounds, list_exact
from molora_fed.privacy.sums.bisection import narrow_down
from molora_fed.privacy.sums.coordinator import Coordinator
from molora_fed.privacy.sums.fixed_point import FixedPoint
from molora_fed.privacy.sums.messages import Terms, max_message_bytes
from molora_fed.privacy.sums.robust import sum_by_group
from molora_fed.privacy.sums.vectors import Total, VectorLayout
from molora_fed.storage.files import write_bytes, write_json

__all__ = ["RemoteMembers"]

_COUNTS_BYTES = 2**20
_HEADER_BYTES = 2**16


@dataclass(frozen=True)
class _Fusion:
    """The fusion that goes on, and where it is kept."""

    id: str
    folder: Path
    contributions: Mapping[str, Contribution]
    counts: Mapping[str, TextCounts]
    overlap: OverlapCarrier


@dataclass(frozen=True)
class _Asking:
    """A sum that is asked for: its place among them, and each member's question."""

    turn: int
    id: str
    questions: Mapping[str, Shipment]


class RemoteMembers:
    """Asks the members of a fusion; see `Members`.

    Args:
        exchange: With all contributors.
        charter: The cooperative's charter.
        contributions: Admitted ones, in canonical order.
        folder: Gets what is known of each fusion, so that one is never asked for again.
        is_gone: Whether a contributor has not been heard of for so long that the others go on.
        on_place: Told what is asked.
        on_note: Told what has to be said of a sum, a sentence each.
    """

    def __init__(
        self,
        exchange: Exchange,
        charter: Charter,
        contributions: Sequence[Contribution],
        folder: Path,
        *,
        is_gone: Callable[[str], bool] = lambda name: False,
        on_place: Callable[[str], None] = lambda place: None,
        on_note: Callable[[str], None] = lambda note: None,
    ) -> None:
        self._exchange = exchange
        self._charter = charter
        self._contributions = {one.manifest.contributor: one for one in contributions}
        self._folder = folder
        self._is_gone = is_gone
        self._on_place = on_place
        self._on_note = on_note
        self._fusion: _Fusion | None = None
        self._present: tuple[str, ...] = ()
        self._turn = 0

    def begin(self, plan: FusionPlan) -> Mapping[str, TextCounts]:
        """See `Members`.

        Raises:
            SumError: If sums are masked and there are fewer than three members.
        """
        chosen = {one.contributor for one in plan.contributions}
        taken = {name: one for name, one in self._contributions.items() if name in chosen}
        if self._is_masked and len(taken) < MIN_MEMBERS:
            raise SumError(
                f"Cannot fuse texts that stay with their owners: expected {MIN_MEMBERS} members at "
                f"least, so that no total is one member's, got {len(taken)}. Wait for more, or "
                "found a cooperative with summing = 'robust'."
            )
        fusion = name_fusion(self._charter, [one.id for one in taken.values()])
        place = self._folder / fusion[:16]
        manifests = {name: one.manifest for name, one in sorted(taken.items())}
        overlap = OverlapCarrier(place, manifests, fusion=fusion, on_note=self._on_note)
        counts = self._ask_counts(fusion, taken, place / "counts.json", overlap)
        self._fusion = _Fusion(fusion, place, taken, counts, overlap)
        self._present = tuple(sorted(counts))
        self._turn = 0
        return counts

    def _ask_counts(
        self,
        fusion: str,
        taken: Mapping[str, Contribution],
        kept: Path,
        overlap: OverlapCarrier,
    ) -> dict[str, TextCounts]:
        if kept.is_file():
            found = json.loads(kept.read_bytes())
            return {name: TextCounts.model_validate(one) for name, one in found.items()}
        self._on_place("experts")
        asked = self._exchange.publish(
            lambda folder: save_experts(ExpertsAsked(fusion=fusion), list(taken.values()), folder)
        )

        domains = {name: one.manifest.domain for name, one in taken.items()}

        def read(name: str, folder: Path) -> TextCounts:
            counts = read_counts(folder / ANSWER_FILE)
            self._check_counts(name, counts)
            if set(counts.claims) != set(list_drawn(fusion, domains, name)):
                raise FederationError(
                    f"Cannot use the counts of '{name}': expected losses of the adapters that it "
                    f"was drawn for, got {len(counts.claims)} others. Ask that contributor to run "
                    "the same molora-fed version."
                )
            overlap.take_offer(name, folder)
            return counts

        found = self._exchange.ask(
            dict.fromkeys(sorted(taken), asked), read, answer_bytes=_COUNTS_BYTES + OFFER_BYTES
        )
        counts = dict(sorted(found.items()))
        self._check_claims(fusion, counts)
        write_json(kept, {name: one.model_dump(mode="json") for name, one in counts.items()})
        self._exchange.forget(asked)
        return counts

    def _check_claims(self, fusion: str, counts: Mapping[str, TextCounts]) -> None:
        """Refuse an adapter that those who measured it disagree with.

        Raises:
            ExpertError: Naming it, and who measured what.
        """
        domains = {name: one.domain for name, one in counts.items()}
        for whom, domain in domains.items():
            found = {
                name: (domains[name], counts[name].claims[whom])
                for name in draw_measurers(fusion, domains, whom)
                if whom in counts[name].claims
            }
            fault = find_disagreement(whom, domain, found)
            if fault:
                raise ExpertError(f"Cannot fuse the adapter of '{whom}': {fault}.", whom)

    def _check_counts(self, name: str, counts: TextCounts) -> None:
        """Refuse counts that the charter does not allow for."""
        samples = self._charter.amendment.samples
        most = samples.calibration * (self._charter.identity.corpus.block_size - 1)
        domain = self._contributions[name].manifest.domain
        got = (counts.domain, counts.tokens, counts.blocks)
        if counts.domain != domain or counts.tokens > most or counts.blocks > samples.held_out:
            raise FederationError(
                f"Cannot use the counts of '{name}': expected '{domain}', at most {most} tokens "
                f"and {samples.held_out} blocks, got {got}. Ask that contributor to run the same "
                "molora-fed version."
            )

    def recount(self) -> Mapping[str, TextCounts]:
        """See `Members`."""
        return self._open.overlap.recount(self._open.counts)

    def add_up(self, question: SumQuestion, rounds: SumRounds, check: Check) -> Total:
        """See `Members`."""
        fusion = self._open
        layout = rounds.lay_out(question)
        self._turn += 1
        asked = self._publish(question, fusion)
        kept = fusion.folder / asked.id[:16]
        if not (kept / "total.json").is_file():
            self._on_place(question.place)
            total = (
                self._add_masked(asked, layout, check, kept)
                if self._is_masked
                else self._add_robustly(asked, layout, check)
            )
            write_tensors(kept / "total.safetensors", total.parts)
            said = {"members": list(total.members), "notes": list(total.notes)}
            write_json(kept / "total.json", said)  # last: with it the total is there
            for state in kept.glob("coordinator-*.bin"):
                state.unlink()
        for files in set(asked.questions.values()):
            self._exchange.forget(files)
        fusion.overlap.tidy(asked.turn)
        said = json.loads((kept / "total.json").read_bytes())
        for note in said["notes"]:
            self._on_note(note)
        self._present = tuple(said["members"])  # who has left stays out of this fusion
        parts = read_tensors(kept / "total.safetensors")
        return Total(parts, tuple(said["members"]), tuple(said["notes"]))

    @property
    def _open(self) -> _Fusion:
        assert self._fusion is not None, "`begin` comes first"
        return self._fusion

    @property
    def _is_masked(self) -> bool:
        return self._charter.identity.summing == "masked"

    def _publish(self, question: SumQuestion, fusion: _Fusion) -> _Asking:
        """The question of a sum, beside which something may ride along for a member."""
        asked = SumAsked(
            fusion=fusion.id,
            place=question.place,
            routers=list(question.routers),
            # What a member measured of others' adapters is nobody else's business.
            counts={n: c.model_copy(update={"claims": {}}) for n, c in fusion.counts.items()},
            members=list(self._present),
        )

        def publish(riders: Mapping[str, Path]) -> Shipment:
            write = partial(save_sum, asked, question.state, riders=riders)
            return self._exchange.publish(write)

        bare = publish({})
        written: dict[tuple[tuple[str, Path], ...], Shipment] = {(): bare}
        questions = {}
        for name in self._present:
            riders = fusion.overlap.list_riders(self._turn, name)
            key = tuple(riders.items())
            if key not in written:
                written[key] = publish(riders)
            questions[name] = written[key]
        return _Asking(self._turn, bare.id, questions)

    def _may_leave(self, missing: Sequence[str]) -> bool:
        """Whether all of them are gone, and each domain keeps somebody."""
        counts = self._open.counts
        left = {counts[name].domain for name in self._present if name not in missing}
        return left == {one.domain for one in counts.values()} and all(map(self._is_gone, missing))

    def _add_robustly(self, asked: _Asking, layout: VectorLayout, check: Check) -> Total:
        counts, overlap = self._open.counts, self._open.overlap

        def read(name: str, folder: Path) -> NDArray[np.float64]:
            vector, _ = layout.clip(read_vector(folder, layout.length), who=name)
            check(layout.unflatten(vector), (name,))
            overlap.take_answer(asked.turn, name, folder, counts[name])
            return vector

        beside = overlap.count_answer_bytes(asked.turn)
        vectors = self._exchange.ask(
            asked.questions,
            read,
            answer_bytes=8 * layout.length + _HEADER_BYTES + beside,
            is_enough=self._may_leave,
        )
        return sum_by_group(
            vectors,
            layout,
            {name: one.domain for name, one in counts.items()},
            {name: float(one.tokens) for name, one in counts.items()},
            trim_share=TRIM_SHARE,
            exact=list_exact(layout),
        )

    def _add_masked(self, asked: _Asking, layout: VectorLayout, check: Check, kept: Path) -> Total:
        """Add up masked vectors; where the total is absurd, without the group it comes from."""
        fusion = self._open
        encoding = FixedPoint(layout, len(self._present), SUM_BITS)
        terms = Terms.build(
            {n: fusion.contributions[n].manifest.public_key for n in self._present},
            encoding,
            identity=self._charter.identity_hash,
            fusion=fusion.id,
            question=asked.id,
        )
        attempts: dict[tuple[str, ...], tuple[int, _Asking]] = {}

        def open_total(names: Sequence[str]) -> Total:
            chosen = tuple(names)
            if chosen == self._present:
                return self._open_masked(terms, asked, encoding, kept)
            if chosen not in attempts:
                number = len(attempts) + 1
                again = AgainAsked(
                    fusion=fusion.id, question=asked.id, attempt=number, members=list(chosen)
                )
                files = self._exchange.publish(partial(save_again, again))
                questions = dict.fromkeys(chosen, files)
                attempts[chosen] = number, _Asking(0, asked.id, questions)
            number, once_more = attempts[chosen]
            return self._open_masked(terms.over(chosen, number), once_more, encoding, kept)

        def find_fault(total: Total) -> str:
            try:
                check(total.parts, total.members)
            except SumError as error:
                return str(error)
            return "" if total.parts else "a total beyond what its members could give."

        whole = open_total(self._present)
        fault = find_fault(whole)
        if not fault:
            return whole
        self._on_note(f"A total is absurd and is looked into: {fault}")
        found = narrow_down(
            whole, open_total=open_total, is_good=lambda total: not find_fault(total)
        )
        suspects = "; ".join(", ".join(group) for group in found.suspects)
        members = tuple(sorted(name for total in found.good for name in total.members))
        left = {fusion.counts[name].domain for name in members}
        if left != {one.domain for one in fusion.counts.values()}:
            raise SumError(
                f"Cannot use the sum '{asked.id[:16]}': expected a total that texts could have, "
                f"got an absurd one among {suspects}, without whom a domain is lost: {fault} Ask "
                "them to run the same molora-fed version, or withdraw whoever it was."
            )
        parts = {
            part.name: torch.stack([total.parts[part.name] for total in found.good]).sum(dim=0)
            for part in layout.parts
        }
        note = f"Left out from here on, because an absurd sum came from among them: {suspects}."
        return Total(parts, members, (note, *found.notes))

    def _open_masked(self, terms: Terms, asked: _Asking, encoding: FixedPoint, kept: Path) -> Total:
        """Phase after phase, from wherever the sum was when this was killed.

        Returns:
            The total; without parts where it is beyond what clipped vectors can add up to.
        """
        state = kept / f"coordinator-{terms.attempt}.bin"
        coordinator = (
            Coordinator.from_bytes(state.read_bytes())
            if state.is_file()
            else Coordinator.begin(terms)
        )
        limit = max_message_bytes(len(terms.members)) + terms.length * terms.bits // 8 + 1
        counts, overlap = self._open.counts, self._open.overlap
        while True:
            questions = self._write_phase(coordinator, asked)
            expected = len(questions)
            # What rides along comes with the first message.
            turn = asked.turn if coordinator.state.phase == "keys" else 0
            beside = overlap.count_answer_bytes(turn)

            def read(name: str, folder: Path, turn: int = turn) -> bool:
                coordinator.receive(name, read_message(folder, max_bytes=limit))
                overlap.take_answer(turn, name, folder, counts[name])
                return True

            def is_enough(missing: Sequence[str], expected: int = expected) -> bool:
                return expected - len(missing) >= terms.threshold and self._may_leave(missing)

            self._exchange.ask(
                questions, read, answer_bytes=limit + _HEADER_BYTES + beside, is_enough=is_enough
            )
            if coordinator.state.phase == "revealed":
                break
            coordinator.advance()
            write_bytes(state, coordinator.to_bytes())
            for files in set(questions.values()):
                self._exchange.forget(files)
        encoded, members = coordinator.open_total(), tuple(coordinator.survivors)
        for files in set(questions.values()):
            self._exchange.forget(files)
        try:
            total = encoding.decode(encoded, len(members))
        except SumError:
            return Total({}, members, (), encoded)
        return Total(encoding.layout.unflatten(total), members, (), encoded)

    def _write_phase(self, coordinator: Coordinator, asked: _Asking) -> Mapping[str, Shipment]:
        """The question of this phase for each member."""
        terms = coordinator.state.terms
        if coordinator.state.phase == "keys":
            return asked.questions
        phase = PhaseAsked(fusion=terms.fusion, question=terms.question, attempt=terms.attempt)
        written: dict[bytes, Shipment] = {}
        for message in coordinator.outgoing().values():
            if message not in written:
                written[message] = self._exchange.publish(partial(save_phase, phase, message))
        return {name: written[message] for name, message in coordinator.outgoing().items()}
