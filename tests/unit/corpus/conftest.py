"""Small made-up text, for the whole room."""

import random

import pytest

from molora_fed.types import Document


@pytest.fixture(scope="session")
def make_text():
    """`make_text(seed, words)`: random words, a line break after every twelfth."""

    def make(seed, words=120):
        rng = random.Random(seed)
        chosen = [f"w{rng.randrange(5_000)}" for _ in range(words)]
        lines = [" ".join(chosen[n : n + 12]) for n in range(0, words, 12)]
        return "\n".join(lines) + "\n"

    return make


@pytest.fixture(scope="session")
def make_documents(make_text):
    """`make_documents(count)`: unrelated documents of 100 to 140 words."""
    return lambda count: [
        Document(f"d{n:03}", make_text(n, 100 + n * 7 % 41)) for n in range(count)
    ]
