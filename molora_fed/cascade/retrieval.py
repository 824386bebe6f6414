"""Solved tasks before a prompt (variant UJ): those similar enough, by n-grams of characters.

Off unless a cascade asks for it: the paper lost accuracy by it where nothing similar was there.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molora_fed.errors import CascadeError
from molora_fed.storage.files import canonical_json, hash_bytes

__all__ = ["Example", "Found", "Retrieval", "compute_vectors"]

NUM_BUCKETS = 2**12
NGRAM = 3


@dataclass(frozen=True)
class Example:
    """A solved task.

    Attributes:
        id: Of the task.
        prompt: Its prompt.
        answer: Its answer, as a model should write it.
    """

    id: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Found:
    """A solved task that is similar to a prompt.

    Attributes:
        id: Of the task.
        prompt: Its prompt.
        answer: Its answer.
        similarity: Cosine, in [0, 1].
    """

    id: str
    prompt: str
    answer: str
    similarity: float


def compute_vectors(texts: Sequence[str]) -> NDArray[np.float32]:
    """Hashed counts of three-character pieces, of length 1 each, (texts, 4096).

    Args:
        texts: Texts; case and repeated spaces do not count.
    """
    vectors = np.zeros((len(texts), NUM_BUCKETS), dtype=np.float32)
    for row, text in zip(vectors, texts, strict=True):
        plain = f" {' '.join(text.casefold().split())} "
        pieces = [plain[at : at + NGRAM] for at in range(max(1, len(plain) - NGRAM + 1))]
        buckets = [zlib.crc32(piece.encode("utf-8", "replace")) % NUM_BUCKETS for piece in pieces]
        np.add.at(row, buckets, 1.0)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


class Retrieval:
    """Finds solved tasks that are similar to a prompt.

    Attributes:
        threshold: Least similarity.
        count: How many at most.
    """

    def __init__(
        self, examples: Sequence[Example], *, threshold: float = 0.7, count: int = 3
    ) -> None:
        """Take solved tasks.

        Args:
            examples: Solved tasks; none of them may be asked.
            threshold: Least similarity, in [0, 1]; the paper found less than 0.7 harmful.
            count: How many are shown at most, >= 1.

        Raises:
            CascadeError: If a number is out of range, or there are no examples.
        """
        if not examples or not 0 <= threshold <= 1 or count < 1:
            raise CascadeError(
                "Cannot retrieve examples: expected at least one example, a threshold in [0, 1] "
                f"and a count >= 1, got {len(examples)}, {threshold} and {count}. Correct "
                "[cascade.retrieval]."
            )
        self._examples = list(examples)
        self._vectors = compute_vectors([one.prompt for one in examples])
        self.threshold = threshold
        self.count = count

    def find(self, prompt: str) -> tuple[Found, ...]:
        """Solved tasks that are similar enough, the most similar last, next to the prompt.

        Args:
            prompt: A task's; an example with this very prompt is left out.
        """
        similarities = self._vectors @ compute_vectors([prompt])[0]  # (examples,)
        order = np.argsort(-similarities, kind="stable")
        found: list[Found] = []
        for at in order:
            one, similarity = self._examples[at], min(1.0, float(similarities[at]))
            if similarity < self.threshold or len(found) == self.count:
                break
            if one.prompt != prompt:
                found.append(Found(one.id, one.prompt, one.answer, round(similarity, 6)))
        return tuple(reversed(found))

    def describe(self) -> Mapping[str, Any]:
        """What decides which examples are found, for the trace."""
        plain = [[one.id, one.prompt, one.answer] for one in self._examples]
        return {
            "examples": len(self._examples),
            "sha256": hash_bytes(canonical_json(plain)),
            "threshold": self.threshold,
            "count": self.count,
        }
