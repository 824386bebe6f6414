import json

import numpy as np
import pytest

from molora_fed.charter import CorpusRules
from molora_fed.corpus import prepare
from molora_fed.corpus.clusters import compute_contamination
from molora_fed.corpus.prepare import (
    build_contamination_report,
    load_corpus,
    prepare_corpus,
    split_documents,
)
from molora_fed.corpus.report import parse_report
from molora_fed.errors import CorpusError
from molora_fed.types import Document, Split

RULES = CorpusRules(block_size=32)


def names(split):
    return {document.name for document in split}


def test_whole_way(tokenizer, make_documents, tmp_path):
    documents = make_documents(300)
    corpus = prepare_corpus("d", documents, tokenizer, rules=RULES, folder=tmp_path / "c")
    report = corpus.report
    assert report.documents == report.clusters == 300
    assert report.characters == sum(len(d.text) for d in documents)
    assert report.contamination == 0
    assert report.qualifies
    assert set(corpus.blocks) == set(Split)
    for split, blocks in corpus.blocks.items():
        counted = report.splits[split]
        assert (counted.blocks, counted.tokens) == (len(blocks), blocks.tokens.size)
        assert blocks.block_size == 32
        assert blocks.domain == "d"
    used = [set(np.unique(blocks.clusters).tolist()) for blocks in corpus.blocks.values()]
    assert sum(map(len, used)) == len(set().union(*used))


def test_kept_and_found_again(tokenizer, make_documents, tmp_path, monkeypatch):
    folder = tmp_path / "c"
    documents = make_documents(60)
    first = prepare_corpus("d", iter(documents), tokenizer, rules=RULES, folder=folder)
    loaded = load_corpus(folder)
    assert loaded.report == first.report
    assert {s: b.fingerprint for s, b in loaded.blocks.items()} == {
        s: b.fingerprint for s, b in first.blocks.items()
    }
    monkeypatch.setattr(prepare, "split_documents", lambda *_, **__: pytest.fail("done twice"))
    again = prepare_corpus("d", documents, tokenizer, rules=RULES, folder=folder)
    assert again.report == first.report


@pytest.mark.parametrize("change", ["text", "seed", "block_size", "shard"])
def test_other_input_is_prepared_anew(tokenizer, make_documents, tmp_path, change):
    folder = tmp_path / "c"
    documents = make_documents(120)
    first = prepare_corpus("d", documents, tokenizer, rules=RULES, folder=folder)
    rules, shard = RULES, (0, 1)
    if change == "text":
        documents[0] = Document("d000", documents[0].text + "one more")
    elif change == "shard":
        shard = (1, 2)
    else:
        rules = RULES.model_copy(update={"seed": {"split_seed": 7}}.get(change, {"block_size": 16}))
    second = prepare_corpus("d", documents, tokenizer, rules=rules, folder=folder, shard=shard)
    assert any(
        second.blocks[split].fingerprint != first.blocks[split].fingerprint for split in Split
    )
    assert load_corpus(folder).report == second.report


def test_splitting_ignores_names_of_files_and_tokenizer(make_documents):
    documents = make_documents(60)
    first = split_documents(documents, seed=1)
    second = split_documents([Document("x" + d.name, d.text) for d in documents], seed=1)
    assert [d.text for d in first[Split.HELD_OUT]] == [d.text for d in second[Split.HELD_OUT]]
    assert len(first) == 5


def test_copies_are_dropped_and_near_copies_stay_together(make_documents):
    documents = make_documents(60)
    copies = [Document(f"copy-{d.name}", d.text.replace("\n", "  ")) for d in documents[:10]]
    near = [Document(f"near-{d.name}", d.text + "a new end") for d in documents]
    split = split_documents([*documents, *copies, *near], seed=1)
    assert split.duplicates == 10
    for members in split.values():
        assert {n.removeprefix("near-") for n in names(members)} <= names(members)
    texts = {s: [d.text for d in members] for s, members in split.items()}
    assert compute_contamination(texts[Split.TRAIN], texts[Split.HELD_OUT]) == 0


def test_contamination_is_measured_on_the_whole_train_split(tokenizer, make_documents, make_text):
    shared = " ".join(make_text(9_999).split()[:9])  # two 8-grams in every document
    documents = [Document(d.name, d.text + shared) for d in make_documents(80)]
    corpus = prepare_corpus("d", documents, tokenizer, rules=RULES)
    split = split_documents(documents, seed=RULES.split_seed)
    expected = compute_contamination(
        [d.text for d in split[Split.TRAIN]], [d.text for d in split[Split.HELD_OUT]]
    )
    assert expected > 0
    assert corpus.report.contamination == pytest.approx(expected)
    assert corpus.report.splits[Split.TRAIN].contamination == 0


def test_shards_are_disjoint_and_complete(tokenizer, make_documents):
    documents = make_documents(200)
    whole = prepare_corpus("d", documents, tokenizer, rules=RULES)
    parts = [prepare_corpus("d", documents, tokenizer, rules=RULES, shard=(n, 3)) for n in range(3)]
    for split in Split:
        found = [set(np.unique(p.blocks[split].clusters).tolist()) for p in parts]
        assert sum(map(len, found)) == len(set().union(*found))
        assert sum(p.report.splits[split].documents for p in parts) == (
            whole.report.splits[split].documents
        )
    table = build_contamination_report(p.report for p in parts)
    held_out = whole.report.splits[Split.HELD_OUT]
    assert table["d"]["held_out_clusters"] == held_out.clusters
    assert table["d"]["contamination"] == max(p.report.contamination for p in parts)
    with pytest.raises(CorpusError, match="shard index below 3, got 3"):
        prepare_corpus("d", documents, tokenizer, rules=RULES, shard=(3, 3))


@pytest.mark.parametrize(
    ("texts", "parts"),
    [
        ([], ["0 documents of 0 characters", "at least 5 documents", "got 0"]),
        ([" "], ["0 documents of 0 characters"]),
        (["hello"], ["1 documents of 5 characters", "got 1"]),
        (list("abcdefg"), ["one block of 32 tokens", "7 characters", "characters are needed"]),
    ],
)
def test_too_little_text(tokenizer, tmp_path, texts, parts):
    documents = [Document(str(n), text) for n, text in enumerate(texts)]
    with pytest.raises(CorpusError) as caught:
        prepare_corpus("mine", documents, tokenizer, rules=RULES, folder=tmp_path / "c")
    message = str(caught.value)
    assert "Cannot prepare domain 'mine'" in message
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    assert not (tmp_path / "c").exists()


def test_what_is_said_to_be_needed_suffices(tokenizer, make_documents):
    with pytest.raises(CorpusError, match="about") as caught:
        prepare_corpus("d", [Document(str(n), str(n)) for n in range(9)], tokenizer, rules=RULES)
    needed = int(str(caught.value).split("about ")[1].split()[0])
    documents, size = [], 0
    for document in make_documents(400):
        documents.append(document)
        size += len(document.text)
        if size >= needed:
            break
    prepare_corpus("d", documents, tokenizer, rules=RULES)


def test_one_large_file_can_be_used(tokenizer, make_text):
    corpus = prepare_corpus("d", [Document("a", make_text(1, 9_000))], tokenizer, rules=RULES)
    assert corpus.report.clusters >= 20
    assert all(len(blocks) for blocks in corpus.blocks.values())


def test_damaged_folder(tokenizer, make_documents, tmp_path):
    folder = tmp_path / "c"
    with pytest.raises(CorpusError, match=r"got no valid corpus\.json"):
        load_corpus(folder)
    documents = make_documents(60)
    prepare_corpus("d", documents, tokenizer, rules=RULES, folder=folder)
    (folder / "train.safetensors").write_bytes((folder / "held-out.safetensors").read_bytes())
    with pytest.raises(CorpusError, match=r"blocks of split 'train', got .* of 'held-out'"):
        load_corpus(folder)
    # The same input again repairs it.
    again = prepare_corpus("d", documents, tokenizer, rules=RULES, folder=folder)
    assert load_corpus(folder).report == again.report
    header = json.loads((folder / "corpus.json").read_text())
    del header["report"]["shard"]
    (folder / "corpus.json").write_text(json.dumps(header))
    with pytest.raises(CorpusError, match="Prepare it again"):
        load_corpus(folder)


def test_contamination_report(tokenizer, make_documents):
    corpora = [
        prepare_corpus(name, make_documents(60), tokenizer, rules=RULES) for name in ("b", "a")
    ]
    table = build_contamination_report(corpus.report for corpus in corpora)
    assert list(table) == ["a", "b"]
    assert table["a"]["contamination"] == 0
    assert table["a"]["within_limit"]
    assert not table["a"]["qualifies"]
    assert set(table["a"]["by_split"]) == {"validation", "calibration", "admission", "held-out"}
    json.dumps(table)
    value = corpora[0].report.to_json()
    assert parse_report(value) == corpora[0].report
    assert json.loads(json.dumps(value)) == value
