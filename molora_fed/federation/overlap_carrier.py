"""The coordinator's part in comparing held-out text with train text: it carries what members send.

What is malformed is not carried; its sender is named, and the fusion goes on without that part of
the comparison. What is carried stays on disk until everybody has it.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from molora_fed.contributions.manifest import Manifest
from molora_fed.errors import FederationError, SignatureError
from molora_fed.federation.overlap_letters import (
    COUNTS,
    OVERLAP,
    QUERIES,
    QUERY,
    REPLIES,
    SET,
    SETS,
    SIGNATURE,
    SIGNATURES,
    read_part,
    read_set,
)
from molora_fed.federation.sum_letters import read_counts
from molora_fed.fusion.sum_questions import TextCounts
from molora_fed.privacy.messages import MAX_QUERY_BYTES, MAX_REPLY_BYTES, Query, Reply
from molora_fed.storage.files import canonical_json, write_bytes
from molora_fed.storage.untrusted import clean

__all__ = ["OverlapCarrier"]

FIRST, SECOND = 1, 2
"""The sums beside which queries and sets, then replies, go out."""
_COUNTS_BYTES = 2**20
_FIXED = ("domain", "tokens", "blocks", "empty", "grams", "own", "base", "has_base")
"""Counts that others' text does not change."""


class OverlapCarrier:
    """Takes queries, sets and replies of a fusion's members from one to another.

    Args:
        folder: Of the fusion.
        manifests: Signed ones of all members, by name; who states no query takes no part.
        fusion: Id of the fusion.
        on_note: Told what is missing in the comparison, a sentence each.
    """

    def __init__(
        self,
        folder: Path,
        manifests: Mapping[str, Manifest],
        *,
        fusion: str,
        on_note: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._members = {name: one for name, one in manifests.items() if one.held_out_query}
        self._fusion = fusion
        self._on_note = on_note

    def take_offer(self, name: str, answer: Path) -> None:
        """Keep a member's query and set.

        Raises:
            StorageError: On I/O errors.
        """
        if name not in self._members or len(self._members) < 2:
            return
        manifest = self._members[name]
        assert manifest.held_out_query is not None
        with self._watching(name):
            data = read_part(answer / QUERY, MAX_QUERY_BYTES)
            query, stated = Query.read(data, name), manifest.held_out_query.sha256
            if query.commitment != stated:
                raise FederationError(
                    f"Cannot carry the query of '{name}': expected the one that its manifest "
                    f"states, {stated[:12]}, got {query.commitment[:12]}. Ask that contributor to "
                    "contribute again."
                )
            write_bytes(self._folder / QUERIES / name, data)
        with self._watching(name):
            _, data = read_set(answer / SET, answer / SIGNATURE, manifest, fusion=self._fusion)
            signature = (answer / SIGNATURE).read_bytes()
            write_bytes(self._folder / SIGNATURES / name, signature)
            write_bytes(self._folder / SETS / name, data)

    def list_riders(self, turn: int, name: str) -> dict[str, Path]:
        """What goes to a member beside the question of a sum, by its name in the folder.

        Args:
            turn: Which sum of the fusion it is, from 1.
            name: The member's.
        """
        parts = {FIRST: (QUERIES, SETS, SIGNATURES), SECOND: (REPLIES,)}.get(turn, ())
        if name not in self._members:
            return {}
        found: dict[str, Path] = {}
        for part in parts:
            where = self._folder / part / (name if turn == SECOND else "")
            names = sorted(where.iterdir()) if where.is_dir() else []
            found |= {f"{part}/{path.name}": path for path in names if path.name in self._members}
        return found

    def count_answer_bytes(self, turn: int) -> int:
        """What comes back at most beside the answer to a sum."""
        counts = {FIRST: MAX_REPLY_BYTES * len(self._members), SECOND: _COUNTS_BYTES}
        return counts.get(turn, 0)

    def take_answer(self, turn: int, name: str, answer: Path, counts: TextCounts) -> None:
        """Keep what came back beside the answer to a sum.

        Args:
            turn: See `list_riders`.
            name: The member's.
            answer: Folder of its answer.
            counts: Its first ones.

        Raises:
            StorageError: On I/O errors.
        """
        if turn == FIRST and self.list_riders(turn, name):
            self._take_replies(name, answer)
        if turn == SECOND and self.list_riders(turn, name):
            with self._watching(name):
                self._take_counts(name, answer, counts)

    def _take_replies(self, name: str, answer: Path) -> None:
        for asker in self._members:
            kept = self._folder / QUERIES / asker
            if asker == name or not kept.is_file():
                continue
            with self._watching(name, f" to '{asker}'"):
                data = read_part(answer / REPLIES / asker, MAX_REPLY_BYTES)
                Reply.read(data, name, Query.read(kept.read_bytes(), asker))
                write_bytes(self._folder / REPLIES / asker / name, data)

    def _take_counts(self, name: str, answer: Path, first: TextCounts) -> None:
        read_part(answer / COUNTS, _COUNTS_BYTES)
        said = read_counts(answer / COUNTS)
        answered = self.list_riders(SECOND, name)
        known = {name, *(Path(rider).name for rider in answered)}
        wrong = [key for key in _FIXED if getattr(said, key) != getattr(first, key)]
        wrong += [] if said.left_out >= first.left_out else ["left_out"]
        wrong += [] if set(said.compared) <= known else ["compared"]
        if wrong:
            raise FederationError(
                f"Cannot use the counts of '{name}': expected those from before with what others' "
                f"text adds, got other {', '.join(wrong)}. Run the same molora-fed version "
                "everywhere."
            )
        kept = canonical_json(said.model_dump(mode="json"))
        write_bytes(self._folder / OVERLAP / "counts" / name, kept)
        missed = sorted(self._members.keys() - set(said.compared))
        if missed:
            self._on_note(f"Held-out text of '{name}' is not compared with {', '.join(missed)}.")

    def recount(self, counts: Mapping[str, TextCounts]) -> dict[str, TextCounts]:
        """Counts of all members, those from before where the comparison failed.

        Args:
            counts: Those from before, by name.
        """
        found = dict(counts)
        for name in counts:
            path = self._folder / OVERLAP / "counts" / name
            if path.is_file():
                said = read_counts(path)
                found[name] = said.model_copy(update={"claims": counts[name].claims})
        return found

    def tidy(self, turn: int) -> None:
        """Delete what nobody needs any more, once a sum is done."""
        done = {FIRST: (SETS, SIGNATURES), SECOND: (QUERIES, REPLIES)}.get(turn, ())
        for part in done:
            shutil.rmtree(self._folder / part, ignore_errors=True)

    @contextmanager
    def _watching(self, name: str, to: str = "") -> Iterator[None]:
        """Name whose part is missing, and go on."""
        try:
            yield
        except (FederationError, SignatureError) as error:
            self._on_note(f"Held-out text: no part of '{name}'{to}: {clean(error, 400)}")
