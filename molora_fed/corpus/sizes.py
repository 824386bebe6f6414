"""Sizes of documents: long ones are cut, and some of many are chosen evenly."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from molora_fed.types import Document, Markup, Span

__all__ = ["choose_evenly", "cut_long_documents"]

MAX_SHARE = 0.05
PIECES = 250
MIN_PIECE_CHARACTERS = 2_000


_Item = TypeVar("_Item")


def cut_long_documents(documents: Sequence[Document]) -> list[Document]:
    """Cut up documents that alone hold more than a twentieth of all text.

    One large file could otherwise not be split at all. Its pieces, of about 1/250 of all text
    each, end at blank lines where possible and are documents of their own from then on, so that
    neighbouring pieces may lie in different splits. All other documents stay whole.

    Args:
        documents: All documents of a domain.

    Returns:
        The documents in the same order; pieces are named "<name>#1", "<name>#2", ...
    """
    total = sum(len(document.text) for document in documents)
    piece = max(total // PIECES, MIN_PIECE_CHARACTERS)
    result: list[Document] = []
    for document in documents:
        if len(document.text) > max(MAX_SHARE * total, piece):
            start = 0
            for number, part in enumerate(_cut(document.text, piece), 1):
                markup = _cut_markup(document.markup, start, start + len(part))
                result.append(Document(f"{document.name}#{number}", part, markup))
                start += len(part)
        else:
            result.append(document)
    return result


def _cut(text: str, size: int) -> list[str]:
    """Pieces of at least half of and at most `size` characters (the last may be shorter)."""
    pieces, start = [], 0
    while len(text) - start > size:
        window = text[start + size // 2 : start + size]
        cuts = [window.rfind("\n\n") + 2, window.rfind("\n") + 1, window.rfind(" ") + 1]
        found = next((cut for cut, width in zip(cuts, (2, 1, 1), strict=True) if cut >= width), 0)
        end = start + (size // 2 + found if found else size)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]] if text[start:].strip() else pieces


def _cut_markup(markup: Markup | None, first: int, end: int) -> Markup | None:
    """What is known of a piece; a special token that is cut becomes text."""
    if markup is None:
        return None

    def clip(spans: tuple[Span, ...]) -> tuple[Span, ...]:
        cut = ((max(a, first) - first, min(b, end) - first) for a, b in spans)
        return tuple((a, b) for a, b in cut if a < b)

    return Markup(
        tuple((a - first, b - first) for a, b in markup.special if first <= a and b <= end),
        clip(markup.frame),
        None if markup.answers is None else clip(markup.answers),
    )


def choose_evenly(items: Sequence[_Item], sizes: Iterable[int], cap: int) -> list[_Item]:
    """Keep every so-maniest item so that about `cap` characters remain.

    Args:
        items: Items in a fixed order.
        sizes: Characters of each.
        cap: Characters to keep.

    Returns:
        Items spread evenly over the whole sequence, in order; all of them if they fit.
    """
    total = sum(sizes)
    if total <= cap:
        return list(items)
    share, due, kept = cap / total, 0.5, []
    for item in items:
        due += share
        if due >= 1:
            due -= 1
            kept.append(item)
    return kept
