"""Small made-up text and a byte-level tokenizer, for the whole room."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from molora_fed.types import Document


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level tokenizer without merges, 257 ids, end-of-text id 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)} | {"<|end|>": 256}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


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
