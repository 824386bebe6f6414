"""Multiple choice: which built-in domain a piece of a line is from."""

import random
from functools import cache

from molora_acar.tasks.problems import Problem, compute_split
from molora_fed.plugins import get_plugins

__all__ = ["DOMAINS", "make_choice"]

DOMAINS = ("cpp", "python", "readme", "science")
LETTERS = "ABCD"
LONGEST = 32  # characters of a piece at level 1
MIN_LETTERS = 0.5  # of a line's characters: rulers and numbers are from everywhere


def make_choice(generator: random.Random, level: int) -> Problem:
    """A piece of a line, and four domains.

    The piece has 32 characters at level 1, and 8 fewer at each further level, but at least 8. The
    domains are in alphabetical order at level 1, then in any order. A prompt is in the split of the
    document it is from, and lines of documents in several splits are left out, so that what is
    tested is from documents that nobody trained on.

    Args:
        generator: Source of chance.
        level: Difficulty.
    """
    size = max(8, LONGEST - 8 * (level - 1))
    domain = generator.choice(DOMAINS)
    lines = _read_lines(domain)
    while True:
        line, split = lines[generator.randrange(len(lines))]
        start = generator.randrange(len(line) - size + 1)
        order = list(DOMAINS) if level == 1 else generator.sample(DOMAINS, len(DOMAINS))
        shown = " ".join(f"{letter} {name}" for letter, name in zip(LETTERS, order, strict=True))
        prompt = f"{line[start : start + size]}| {shown}:"
        if compute_split(prompt) == split:
            answer = LETTERS[order.index(domain)]
            return Problem(prompt, answer, answer, {"choices": order})


@cache
def _read_lines(domain: str) -> list[tuple[str, str]]:
    """Lines long enough with the split of their documents, sorted."""
    found: dict[str, set[str]] = {}
    for document in get_plugins().domains.resolve(domain)():
        split = compute_split(f"{domain} {document.name}")
        for line in document.text.splitlines():
            text = " ".join(line.split())
            if len(text) >= LONGEST and sum(map(str.isalpha, text)) >= MIN_LETTERS * len(text):
                found.setdefault(text, set()).add(split)
    return [(text, min(splits)) for text, splits in sorted(found.items()) if len(splits) == 1]
