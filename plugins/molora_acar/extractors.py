"""Extractors: the canonical answer in what a model said."""

import string
import unicodedata

from molora_fed.cascade.contract import CascadeTask

__all__ = ["extract_text"]


def extract_text(task: CascadeTask, text: str) -> str | None:
    """The first line that says anything, normalised: NFKC, case-folded, single spaces.

    Punctuation at both ends is left out.

    Args:
        task: The task; not looked at.
        text: A sample.
    """
    for line in text.splitlines():
        words = unicodedata.normalize("NFKC", line).casefold().split()
        found = " ".join(words).strip(string.punctuation + " ")
        if found:
            return found
    return None
