import numpy as np
import pytest

from molora_fed.corpus.blocks import fingerprint_encoding, pack_documents, tokenize_documents
from molora_fed.errors import CorpusError
from molora_fed.types import Document, Split


def pack(documents, tokenizer, clusters=None, block_size=32):
    if clusters is None:
        clusters = np.arange(len(documents), dtype=np.int32)
    return pack_documents(
        documents, clusters, tokenizer, domain="d", split=Split.TRAIN, block_size=block_size
    )


def test_nothing_is_lost_but_the_last_incomplete_block(tokenizer, make_documents):
    documents = make_documents(9)
    blocks = pack(documents, tokenizer)
    expected = np.concatenate(tokenize_documents(documents, tokenizer))
    assert blocks.tokens.dtype == np.int32
    assert len(blocks) == expected.size // 32
    whole = {row.tobytes() for row in expected[: len(blocks) * 32].reshape(-1, 32)}
    assert {row.tobytes() for row in blocks.tokens} == whole


def test_each_document_ends_with_the_end_token(tokenizer):
    tokens = tokenize_documents([Document("a", "xy"), Document("b", "z")], tokenizer)
    assert [len(ids) for ids in tokens] == [3, 2]
    assert all(ids[-1] == 256 for ids in tokens)


def test_special_tokens_in_text_stay_text(tokenizer):
    (ids,) = tokenize_documents([Document("a", "x<|end|>y")], tokenizer)
    assert (ids == 256).tolist() == [False] * (len(ids) - 1) + [True]
    assert tokenizer.decode(ids[:-1]) == "x<|end|>y"


def test_documents_and_clusters_follow_the_tokens(tokenizer, make_documents):
    documents = make_documents(6)
    clusters = np.array([5, 5, 2, 2, 2, 0], dtype=np.int32)
    blocks = pack(documents, tokenizer, clusters)
    assert np.array_equal(blocks.clusters, clusters[blocks.documents])
    tokens = tokenize_documents(documents, tokenizer)
    for index in range(5):  # the last document may be cut off
        assert (blocks.documents == index).sum() == len(tokens[index])


def test_the_first_blocks_come_from_everywhere(tokenizer, make_documents):
    blocks = pack(make_documents(30), tokenizer)
    assert np.unique(blocks.take(len(blocks) // 3).clusters).size > 25


def test_same_input_same_blocks(tokenizer, make_documents):
    first = pack(make_documents(5), tokenizer)
    assert first.fingerprint == pack(make_documents(5), tokenizer).fingerprint


@pytest.mark.parametrize("texts", [[], ["x"]])
def test_too_little_text_gives_no_block(tokenizer, texts):
    blocks = pack([Document(t, t) for t in texts], tokenizer)
    assert blocks.tokens.shape == (0, 32)


def test_a_tokenizer_without_end_token_is_refused(tokenizer):
    class Endless:
        eos_token_id = None
        name_or_path = "some/model"

    with pytest.raises(CorpusError, match="'some/model': expected an end-of-text token"):
        pack([Document("a", "x")], Endless())


def test_fingerprint_ignores_state_left_by_calls(tokenizer):
    before = fingerprint_encoding(tokenizer)
    tokenizer(["some text"], truncation=True, max_length=3)
    assert fingerprint_encoding(tokenizer) == before


def test_fingerprint_without_a_fast_backend():
    class Slow:
        eos_token_id = 1

        def __init__(self, vocabulary):
            self.get_vocab = lambda: vocabulary

    assert fingerprint_encoding(Slow({"a": 0, "b": 1})) == fingerprint_encoding(
        Slow({"b": 1, "a": 0})
    )
    assert fingerprint_encoding(Slow({"a": 0})) != fingerprint_encoding(Slow({"c": 0}))
