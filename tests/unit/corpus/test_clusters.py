import numpy as np
import pytest

from molora_fed.corpus.clusters import cluster_documents
from molora_fed.types import Document

LICENCE = "# Copyright somebody\n" + "".join(
    f"# Permission number {n} is granted to everybody under these terms\n" for n in range(40)
)


def test_unrelated_documents_stay_apart(make_documents):
    assert cluster_documents(make_documents(30), seed=1).tolist() == list(range(30))


def test_near_copies_meet(make_text):
    words = make_text(1).split()
    words[50] = "changed"
    documents = [
        Document("a", make_text(1)),
        Document("b", make_text(2)),
        Document("c", " ".join(words)),
        Document("d", make_text(3)),
    ]
    assert cluster_documents(documents, seed=1).tolist() == [0, 1, 0, 2]


def test_a_short_text_inside_a_long_one_is_found(make_text):
    long = make_text(1, 6_000)
    piece = " ".join(long.split()[3_000:3_040])
    documents = [Document("long", long), Document("piece", piece), Document("x", make_text(2))]
    assert cluster_documents(documents, seed=1).tolist() == [0, 0, 1]


def test_many_copies_are_one_cluster(make_text):
    documents = [Document(f"c{n}", make_text(1) + f" number {n}") for n in range(40)]
    documents.append(Document("other", make_text(2)))
    assert cluster_documents(documents, seed=1).tolist() == [0] * 40 + [1]


def test_a_shared_licence_does_not_link(make_documents):
    plain = make_documents(6)
    licensed = [Document(d.name, LICENCE + d.text) for d in plain]
    assert cluster_documents(licensed, seed=1).tolist() == list(range(6))


def test_chains_are_one_cluster(make_text):
    words = [make_text(n).split() for n in range(4)]
    chain = [Document(str(n), " ".join(words[n] + words[n + 1])) for n in range(3)]
    assert cluster_documents(chain, seed=1).tolist() == [0, 0, 0]


@pytest.mark.parametrize("texts", [[], [""], ["short", "short"], ["", "a b c d e f g h i j"]])
def test_tiny_input(texts):
    documents = [Document(str(n), text) for n, text in enumerate(texts)]
    clusters = cluster_documents(documents, seed=1)
    assert clusters.dtype == np.int32
    assert clusters.tolist() == list(range(len(texts)))


def test_same_input_same_clusters_and_progress(make_documents):
    calls = []
    first = cluster_documents(
        make_documents(12), seed=3, progress=lambda done, total, **_: calls.append((done, total))
    )
    assert np.array_equal(first, cluster_documents(make_documents(12), seed=3))
    assert calls == [(n + 1, 12) for n in range(12)]
