"""Members of a private fusion, asked over the exchange of folders; see `Members`.

Every total is kept as soon as it is opened, and what went into it is deleted: a run that was killed
asks for nothing twice that it knows, and goes on in the middle of a masked sum.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from molora_fed.charter import Charter
from molora_fed.contributions.manifest import Contribution
from molora_fed.errors import FederationError, SumError
from molora_fed.federation.exchange import ANSWER_FILE, Exchange
from molora_fed.federation.messages import Shipment
from molora_fed.federation.overlap_carrier import OverlapCarrier
from molora_fed.federation.overlap_letters import OFFER_BYTES
from molora_fed.federation.sum_letters import (
    ExpertsAsked,
    PhaseAsked,
    SumAsked,
    read_counts,
    read_message,
    read_tensors,
    read_vector,
    save_experts,
    save_phase,
    save_sum,
    write_tensors,
)
from molora_fed.fusion.plan import FusionPlan
from molora_fed.fusion.private_texts import Check
from molora_fed.fusion.sum_rounds import (
    SUM_BITS,
    TRIM_SHARE,
    SumQuestion,
    SumRounds,
    TextCounts,
    list_exact,
    name_fusion,
)
from molora_fed.privacy.sums.coordinator import Coordinator
from molora_fed.privacy.sums.fixed_point import FixedPoint
from molora_fed.privacy.sums.messages import MIN_MEMBERS, Terms, max_message_bytes
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
        folder: Gets what is known of the fusion; other fusions in it are deleted.
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
        for other in self._folder.glob("*"):
            if other != place:
                shutil.rmtree(other)
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

        def read(name: str, folder: Path) -> TextCounts:
            counts = read_counts(folder / ANSWER_FILE)
            self._check_counts(name, counts)
            overlap.take_offer(name, folder)
            return counts

        found = self._exchange.ask(
            dict.fromkeys(sorted(taken), asked), read, answer_bytes=_COUNTS_BYTES + OFFER_BYTES
        )
        counts = dict(sorted(found.items()))
        write_json(kept, {name: one.model_dump(mode="json") for name, one in counts.items()})
        self._exchange.forget(asked)
        return counts

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
                self._add_masked(asked, layout, kept)
                if self._is_masked
                else self._add_robustly(asked, layout, check)
            )
            write_tensors(kept / "total.safetensors", total.parts)
            said = {"members": list(total.members), "notes": list(total.notes)}
            write_json(kept / "total.json", said)  # last: with it the total is there
            (kept / "coordinator.bin").unlink(missing_ok=True)
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
            counts=dict(fusion.counts),
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
            check(layout.unflatten(vector), counts[name].domain, name)
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

    def _add_masked(self, asked: _Asking, layout: VectorLayout, kept: Path) -> Total:
        """Phase after phase, from wherever the sum was when this was killed."""
        fusion = self._open
        encoding = FixedPoint(layout, len(self._present), SUM_BITS)
        public = {n: fusion.contributions[n].manifest.public_key for n in self._present}
        terms = Terms.build(
            public,
            encoding,
            identity=self._charter.identity_hash,
            fusion=fusion.id,
            question=asked.id,
        )
        state = kept / "coordinator.bin"
        coordinator = (
            Coordinator.from_bytes(state.read_bytes())
            if state.is_file()
            else Coordinator.begin(terms)
        )
        while True:
            questions = self._write_phase(coordinator, asked, fusion)
            limit = max_message_bytes(len(terms.members)) + terms.length * terms.bits // 8 + 1
            # What rides along comes with the first message.
            turn = asked.turn if coordinator.state.phase == "keys" else 0
            beside = fusion.overlap.count_answer_bytes(turn)

            def read(name: str, folder: Path, limit: int = limit, turn: int = turn) -> bool:
                coordinator.receive(name, read_message(folder, max_bytes=limit))
                fusion.overlap.take_answer(turn, name, folder, fusion.counts[name])
                return True

            def is_enough(missing: Sequence[str], phase: int = len(questions)) -> bool:
                return phase - len(missing) >= terms.threshold and self._may_leave(missing)

            self._exchange.ask(
                questions, read, answer_bytes=limit + _HEADER_BYTES + beside, is_enough=is_enough
            )
            if coordinator.state.phase == "revealed":
                break
            coordinator.advance()
            write_bytes(state, coordinator.to_bytes())
            for files in set(questions.values()):
                self._exchange.forget(files)
        total = encoding.decode(coordinator.open_total(), len(coordinator.survivors))
        for files in set(questions.values()):
            self._exchange.forget(files)
        return Total(layout.unflatten(total), tuple(coordinator.survivors))

    def _write_phase(
        self, coordinator: Coordinator, asked: _Asking, fusion: _Fusion
    ) -> Mapping[str, Shipment]:
        """The question of this phase for each member."""
        if coordinator.state.phase == "keys":
            return asked.questions
        phase = PhaseAsked(fusion=fusion.id, question=asked.id)
        written: dict[bytes, Shipment] = {}
        for message in coordinator.outgoing().values():
            if message not in written:
                write = partial(save_phase, phase, message)
                written[message] = self._exchange.publish(write)
        return {name: written[message] for name, message in coordinator.outgoing().items()}
