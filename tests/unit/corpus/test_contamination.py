import numpy as np
import pytest

from molora_fed.corpus.clusters import compute_contamination, compute_overlap, compute_shingles

RUN = "one two three four five six seven eight"


def by_hand(train, held_out):
    """Share of held-out positions whose 8 words occur in train, with plain sets of words."""

    def runs(text):
        words = text.lower().split()
        return [tuple(words[n : n + 8]) for n in range(len(words) - 7)]

    known = {run for text in train for run in runs(text)}
    positions = [run in known for text in held_out for run in runs(text)]
    return sum(positions) / len(positions)


def test_agrees_with_plain_sets(make_text):
    train = [make_text(1), make_text(2)]
    mixed = make_text(3) + " ".join(make_text(1).split()[20:60]) + " " + make_text(4)
    expected = by_hand(train, [mixed, make_text(5)])
    assert 0 < expected < 0.2
    assert compute_contamination(train, [mixed, make_text(5)]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("train", "held_out", "expected"),
    [
        ([RUN], [RUN], 1.0),
        ([RUN], ["nothing of it is here at all, really nothing"], 0.0),
        ([], [RUN], 0.0),
        ([RUN], [], 0.0),
        ([RUN], ["too short"], 0.0),
        # A run that begins in one document and ends in the next is in neither.
        (["one two three four", "five six seven eight"], [RUN], 0.0),
    ],
)
def test_edges(train, held_out, expected):
    assert compute_contamination(train, held_out) == expected


def test_overlap_counts_other_clusters_only():
    texts = [RUN, RUN, f"{RUN} nine", "a b c d e f g h i"]
    shingles = compute_shingles(texts)
    inside = compute_overlap(shingles, np.array([0, 0, 1, 2], dtype=np.int32))
    assert inside.tolist() == [1.0, 0.5, 0.0]
    together = compute_overlap(shingles, np.array([0, 0, 0, 1], dtype=np.int32))
    assert together.tolist() == [0.0, 0.0]


def test_overlap_of_nothing():
    assert compute_overlap([], np.empty(0, dtype=np.int32)).shape == (0,)
    empty = compute_shingles(["short", "text"])
    assert compute_overlap(empty, np.array([0, 1], dtype=np.int32)).tolist() == [0.0, 0.0]


def test_overlap_bounds_contamination_of_any_deal(make_text):
    texts = [make_text(n) for n in range(20)]
    texts = [text + " ".join(texts[n - 1].split()[:30]) for n, text in enumerate(texts)]
    clusters = np.arange(20, dtype=np.int32)
    overlap = compute_overlap(compute_shingles(texts), clusters)
    for seed in range(5):
        chosen = np.random.default_rng(seed).permutation(20)[:6]
        rest = [text for n, text in enumerate(texts) if n not in chosen]
        found = compute_contamination(rest, [texts[n] for n in chosen])
        assert found <= overlap[chosen].max()
