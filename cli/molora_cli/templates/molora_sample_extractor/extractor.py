"""The extractor: the canonical answer in what a model said."""

from molora_fed import CascadeTask

MAX_CHARACTERS = 100_000


def extract(task: CascadeTask, text: str) -> str | None:
    """Find the answer in a text: the one function to fill in.

    Two samples agree if their answers are equal, so that an answer is written in one way only. No
    text makes it raise, and the same text gives the same answer.

    Args:
        task: The task; `details` has what its family gives beside, such as choices.
        text: What a model said, of any length.

    Returns:
        The canonical answer, or None if the text has none.

    See docs/hooks/extractors.md, and docs/extractors_judges.md.
    """
    lines = text[-MAX_CHARACTERS:].splitlines()
    found = [" ".join(line.casefold().split()) for line in lines]
    return next((line for line in reversed(found) if line), None)
