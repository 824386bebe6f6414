"""A contributor's side of a private fusion: what it is asked, whether it may be, and its answers.

Everything but the place of a question comes from the charter and from the experts, which are
signed by their own contributors. What a place is asked is counted here before it is answered.
"""

import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from numpy.typing import NDArray
from safetensors.torch import load_file

from molora_fed.charter import Charter
from molora_fed.contributions.contributed import Entrant, collect_entrant
from molora_fed.contributions.manifest import Contribution, Manifest
from molora_fed.errors import AdapterError, QuestionRefusedError
from molora_fed.federation.overlap_answers import OverlapAnswers
from molora_fed.federation.sum_letters import (
    AgainAsked,
    ExpertsAsked,
    PhaseAsked,
    SumAsked,
    build_sum_question,
    identify_sum,
    load_experts,
    read_message,
    read_question,
    save_answer,
    write_tensors,
)
from molora_fed.fusion.claims import list_drawn
from molora_fed.fusion.private_answers import FusionMember
from molora_fed.fusion.published_rounds import plan_rounds
from molora_fed.fusion.sum_questions import MAX_FUSIONS, SumQuestion, TextCounts, name_fusion
from molora_fed.fusion.sum_rounds import SUM_BITS, SumRounds
from molora_fed.population.asked import AskedQuestions, refusing
from molora_fed.privacy.intersection import limit_queries
from molora_fed.privacy.sums.fixed_point import FixedPoint
from molora_fed.privacy.sums.member import Member
from molora_fed.privacy.sums.member_state import MemberState
from molora_fed.privacy.sums.messages import Terms, max_message_bytes
from molora_fed.privacy.sums.vectors import VectorLayout
from molora_fed.storage.files import hash_file, replace_folder, write_bytes, write_json
from molora_fed.storage.untrusted import clean
from molora_fed.types import BASE_EXPERT, Progress

__all__ = ["SumAnswers", "end_fusion"]

_WORDS_FILE, _ENDED_FILE = "words.safetensors", "ended.json"
_SECRET_FILE = "secret"
_FUSION_FOLDERS = "[0-9a-f]" * 16

OpenMember = Callable[[Sequence[Entrant], Path], FusionMember]
"""Opens this contributor's text beside the experts; the folder gets banks."""


def end_fusion(folder: Path, fusion: str) -> None:
    """Delete what a fusion whose result has arrived left: secrets, vectors, experts.

    What was asked stays counted, and nothing of this fusion is answered any more.

    Args:
        folder: The one that `SumAnswers` was given.
        fusion: Its id.

    Raises:
        StorageError: On I/O errors.
    """
    place = folder / fusion[:16]
    if not place.is_dir():
        return
    write_json(place / _ENDED_FILE, {})
    for path in place.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _ENDED_FILE:
            path.unlink()


@dataclass(frozen=True, eq=False)
class _Admitted:
    """A question for a sum that may be answered: what it asks for, and in which form."""

    asked: SumAsked
    id: str
    question: SumQuestion
    rounds: SumRounds
    layout: VectorLayout
    public: Mapping[str, Manifest]


class SumAnswers:
    """Answers the questions of private fusions; the same question gives the same answer.

    Args:
        charter: The cooperative's charter.
        name: This contributor's name.
        contribution: Id of its contribution, which is to be among the experts.
        key: Its signing key.
        folder: Gets experts, banks, what was asked and the states of masked sums.
        open_member: Opens the text, once a fusion.
    """

    def __init__(
        self,
        charter: Charter,
        *,
        name: str,
        contribution: str,
        key: EllipticCurvePrivateKey,
        folder: Path,
        open_member: OpenMember,
    ) -> None:
        self._charter = charter
        self._name = name
        self._contribution = contribution
        self._key = key
        self._folder = folder
        self._open_member = open_member
        self._opened: dict[str, tuple[FusionMember, OverlapAnswers]] = {}

    def answer(self, question: Path, answer: Path, progress: Progress | None) -> str:
        """Answer a question.

        Args:
            question: Its folder.
            answer: Gets the answer's folder.
            progress: Told what is done of it.

        Returns:
            What is sent: "counts", "sums", or "masks".

        Raises:
            QuestionRefusedError: If it is malformed, of other experts than were sent, or the
                charter does not have it asked, or not once more.
            SumRefusedError: If a masked sum would show more than it may.
            MoloraError: Whatever measuring raises, and I/O errors.
        """
        with refusing():
            asked = read_question(question)
        if isinstance(asked, ExpertsAsked):
            counts = self._begin(asked, question, progress)
            save_answer(answer, counts=counts, riders=self._overlap(asked.fusion).offer(progress))
            return "counts"
        if isinstance(asked, SumAsked):
            admitted = self._admit(asked, question)
            # First, for the held-out blocks that count are measured: what is here of others' text.
            riders = self._overlap(asked.fusion).answer(question)
            vector, message = self._sum(admitted, progress)
            save_answer(answer, vector=vector, message=message, riders=riders)
            return "masks" if vector is None else "sums"
        if isinstance(asked, AgainAsked):
            save_answer(answer, message=self._begin_again(asked))
            return "masks"
        message = self._go_on(asked, question)
        save_answer(answer, message=message)
        return "sums" if b"\n" in message else "masks"  # words follow the line of a masked vector

    def _place(self, fusion: str) -> Path:
        return self._folder / fusion[:16]

    def _counts(self, fusion: str) -> Path:
        """Where it is counted what a fusion asked for; stays when another fusion begins."""
        return self._folder / "asked" / fusion

    def _begin(self, asked: ExpertsAsked, question: Path, progress: Progress | None) -> TextCounts:
        """Check and keep the experts of a fusion; measure those that this member was drawn for."""
        with refusing():
            experts = load_experts(question)
        ids = [one.id for one in experts]
        fusion = name_fusion(self._charter, ids)
        faults = [] if asked.fusion == fusion else [f"another id than {fusion[:16]}"]
        if self._contribution not in ids:
            faults.append("experts without this contributor's")
        faults += [fault for one in experts if (fault := self._find_fault(one))]
        names = [one.manifest.contributor for one in experts]
        if len(set(names)) != len(names):
            faults.append("a name twice")
        if BASE_EXPERT in names:
            faults.append("an expert with the base's name")
        if faults:
            raise QuestionRefusedError(
                "Cannot take part in a fusion: expected experts made for this charter, this "
                f"contributor's among them, got {clean('; '.join(faults[:5]), 400)}. Ask the "
                "coordinator."
            )
        counted = AskedQuestions(
            self._folder, self._charter.amendment.number, {"fusion": MAX_FUSIONS}
        )
        counted.admit("fusion", asked.fusion)
        place = self._place(asked.fusion)
        if (place / _ENDED_FILE).is_file():
            raise QuestionRefusedError(
                f"Cannot answer the coordinator: expected another fusion than {asked.fusion[:16]}, "
                "whose result is here, got that one again. Ask for an amendment to fuse these "
                "contributions anew."
            )
        for other in self._folder.glob(_FUSION_FOLDERS):
            if other != place:  # what was opened of another fusion stays known
                shutil.rmtree(other / "experts", ignore_errors=True)
        if not (place / "experts").is_dir():
            with replace_folder(place / "experts") as target:
                shutil.copytree(question / "experts", target, dirs_exist_ok=True)
        domains = {one.manifest.contributor: one.manifest.domain for one in experts}
        drawn = list_drawn(asked.fusion, domains, self._name)
        return self._member(asked.fusion).count(drawn, progress=progress)

    def _find_fault(self, one: Contribution) -> str:
        """What is wrong with an expert; empty if nothing is."""
        manifest, who = one.manifest, f"'{one.manifest.contributor}'"
        if manifest.charter_identity != self._charter.identity_hash:
            return f"{who} made for another charter"
        files = manifest.files.items()
        if any(hash_file(one.folder / name) != entry.sha256 for name, entry in files):
            return f"{who} with other files than were signed"
        try:
            for name in manifest.carried_files:
                one.carried[name]
        except AdapterError as error:
            return f"{who}: {error}"
        return ""

    def _experts(self, fusion: str) -> list[Contribution]:
        place = self._place(fusion)
        if not (place / "experts").is_dir():
            raise QuestionRefusedError(
                f"Cannot answer about fusion {fusion[:16]}: expected one whose experts are here, "
                "got another. Ask the coordinator to begin it."
            )
        return load_experts(place)

    def _member(self, fusion: str) -> FusionMember:
        return self._open(fusion)[0]

    def _overlap(self, fusion: str) -> OverlapAnswers:
        return self._open(fusion)[1]

    def _open(self, fusion: str) -> tuple[FusionMember, OverlapAnswers]:
        if fusion not in self._opened:
            experts, place = self._experts(fusion), self._place(fusion)
            manifests = {one.manifest.contributor: one.manifest for one in experts}
            member = self._open_member([collect_entrant(one) for one in experts], self._folder)
            limits = limit_queries(manifests.keys() - {self._name})
            number = self._charter.amendment.number
            counted = AskedQuestions(self._counts(fusion) / "overlap", number, limits)
            overlap = OverlapAnswers(
                member,
                name=self._name,
                manifests=manifests,
                key=self._key,
                secret=self._secret(place, "overlap-secret"),
                fusion=fusion,
                folder=place / "overlap",
                admit=counted.admit,
            )
            self._opened = {fusion: (member, overlap)}
        return self._opened[fusion]

    def _admit(self, asked: SumAsked, folder: Path) -> "_Admitted":
        """Read a question for a sum, and count that it was asked.

        Raises:
            QuestionRefusedError: If the charter does not have it asked, or not once more.
        """
        member = self._member(asked.fusion)
        public = {one.manifest.contributor: one.manifest for one in self._experts(asked.fusion)}
        self._check_counts(asked, member, {n: one.domain for n, one in public.items()})
        rounds = plan_rounds(
            member.plan, member.hidden_size, asked.counts, seed=self._charter.amendment.seed
        )
        with refusing():
            question = build_sum_question(asked, folder)
            layout = rounds.lay_out(question)
        question_id = identify_sum(folder)
        limits = dict.fromkeys(rounds.limits, 1)
        counted = AskedQuestions(self._counts(asked.fusion), self._charter.amendment.number, limits)
        counted.admit(asked.place, question_id)
        return _Admitted(asked, question_id, question, rounds, layout, public)

    def _sum(
        self, admitted: "_Admitted", progress: Progress | None
    ) -> tuple[NDArray[np.float64] | None, bytes | None]:
        """A vector; or the first message of a masked sum, and the vector stays here."""
        asked, question_id = admitted.asked, admitted.id
        place = self._place(asked.fusion)
        kept = place / question_id[:16]
        vector = self._measure(admitted, kept, progress)
        if self._charter.identity.summing == "robust":
            return vector, None
        encoding = FixedPoint(admitted.layout, len(asked.members), SUM_BITS)
        terms = Terms.build(
            {name: admitted.public[name].public_key for name in asked.members},
            encoding,
            identity=self._charter.identity_hash,
            fusion=asked.fusion,
            question=question_id,
        )
        words = encoding.encode(vector)
        secret = self._secret(place)
        begun = Member.begin(self._name, terms, words, secret=secret, key=self._key)
        if not _find_state(kept, 0).is_file():
            write_tensors(kept / _WORDS_FILE, {"words": torch.from_numpy(words.view(np.int64))})
            write_bytes(_find_state(kept, 0), begun.state.to_bytes(), mode=0o600)
        return None, begun.send_keys()

    def _measure(
        self, admitted: "_Admitted", kept: Path, progress: Progress | None
    ) -> NDArray[np.float64]:
        """The clipped vector, (N,); measured once."""
        path, layout = kept / "vector.safetensors", admitted.layout
        if not path.is_file():
            member = self._member(admitted.asked.fusion)
            sums = member.measure(admitted.question, admitted.rounds, progress=progress)
            vector, _ = layout.clip(layout.flatten(sums, who=self._name), who=self._name)
            write_tensors(path, {"vector": torch.from_numpy(vector)})
        return np.ascontiguousarray(load_file(path)["vector"].numpy())

    def _go_on(self, asked: PhaseAsked, folder: Path) -> bytes:
        """The next message of a masked sum."""
        kept = self._place(asked.fusion) / asked.question[:16]
        state = self._read_state(kept, asked.attempt)
        words = load_file(kept / _WORDS_FILE)["words"].numpy().view(np.uint64)
        secret = self._secret(self._place(asked.fusion))
        member = Member(self._name, state, words, secret=secret, key=self._key)
        limit = max_message_bytes(len(state.terms.members))
        reply = member.answer(read_message(folder, max_bytes=limit))
        write_bytes(_find_state(kept, asked.attempt), member.state.to_bytes(), mode=0o600)
        return reply

    @staticmethod
    def _read_state(kept: Path, attempt: int) -> MemberState:
        path = _find_state(kept, attempt)
        if not path.is_file():
            raise QuestionRefusedError(
                f"Cannot go on with a masked sum: expected one that was begun here, got "
                f"{kept.name}, attempt {attempt}. Ask the coordinator to begin it again."
            )
        return MemberState.from_bytes(path.read_bytes())

    def _begin_again(self, asked: AgainAsked) -> bytes:
        """The first message of another attempt; which totals may be opened the sum itself knows."""
        place = self._place(asked.fusion)
        kept = place / asked.question[:16]
        first = self._read_state(kept, 0)
        earlier = (n for n in reversed(range(asked.attempt)) if _find_state(kept, n).is_file())
        last = self._read_state(kept, next(earlier, 0))
        words = load_file(kept / _WORDS_FILE)["words"].numpy().view(np.uint64)
        begun = Member.begin(
            self._name,
            first.terms.over(asked.members, asked.attempt),
            words,
            secret=self._secret(place),
            key=self._key,
            whole=last.find_whole(),
        )
        path = _find_state(kept, asked.attempt)
        if not path.is_file():
            write_bytes(path, begun.state.to_bytes(), mode=0o600)
        return begun.send_keys()

    def _secret(self, place: Path, name: str = _SECRET_FILE) -> bytes:
        """32 random bytes of this fusion; they are deleted with it."""
        path = place / name
        with suppress(FileNotFoundError):
            return path.read_bytes()
        write_bytes(path, secrets.token_bytes(32), mode=0o600)
        return path.read_bytes()

    def _check_counts(
        self, asked: SumAsked, member: FusionMember, domains: Mapping[str, str]
    ) -> None:
        """Refuse counts that could make a total one member's own."""
        samples = self._charter.amendment.samples
        most = samples.calibration * (self._charter.identity.corpus.block_size - 1)
        wrong = [
            name
            for name, one in asked.counts.items()
            if one.domain != domains.get(name) or one.tokens > most
        ]
        if asked.counts.get(self._name) != member.count() or self._name not in asked.members:
            wrong.append(self._name)
        if wrong:
            raise QuestionRefusedError(
                f"Cannot answer '{asked.place}': expected each member's own counts within what the "
                f"charter asks for, got others for {clean(', '.join(wrong[:5]), 200)}. Ask the "
                "coordinator."
            )


def _find_state(kept: Path, attempt: int) -> Path:
    """Where the state of an attempt at a masked sum lies."""
    return kept / f"member-{attempt}.json"
