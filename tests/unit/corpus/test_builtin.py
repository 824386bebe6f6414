"""The four domains every installation has, on the real text of this one."""

import os
import time
from importlib import metadata

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from molora_fed.charter import CorpusRules
from molora_fed.corpus import builtin
from molora_fed.corpus.builtin import read_cpp, read_python, read_readme, read_science
from molora_fed.corpus.clusters import compute_containment, index_shingles
from molora_fed.corpus.prepare import prepare_corpus, split_documents
from molora_fed.errors import CorpusError
from molora_fed.plugins import load_plugins
from molora_fed.types import Split

READERS = {
    "python": read_python,
    "cpp": read_cpp,
    "science": read_science,
    "readme": read_readme,
}


@pytest.fixture(scope="module")
def documents():
    return {name: list(reader()) for name, reader in READERS.items()}


@pytest.fixture(scope="module")
def bpe(documents):
    """A BPE of 2,048 ids, as the built-in base has, on a part of the text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2_048,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((d.text for some in documents.values() for d in some[::5]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@pytest.mark.parametrize("domain", READERS)
def test_domain_qualifies_and_is_clean(documents, bpe, domain):
    started = time.process_time()
    report = prepare_corpus(domain, documents[domain], bpe, rules=CorpusRules()).report
    seconds = time.process_time() - started
    held_out = report.splits[Split.HELD_OUT]
    assert held_out.clusters >= 20
    assert held_out.blocks >= 64
    assert report.qualifies
    assert report.contamination <= 0.02
    assert report.largest_cluster < 0.2
    assert seconds < 15


def test_other_seeds_are_clean_within_and_across_domains(documents):
    split = {name: split_documents(some, seed=137) for name, some in documents.items()}
    texts = {
        name: {s: [document.text for document in members] for s, members in mine.items()}
        for name, mine in split.items()
    }
    train = {name: index_shingles(mine[Split.TRAIN]) for name, mine in texts.items()}
    for name, mine in texts.items():
        for measured in (Split.VALIDATION, Split.CALIBRATION, Split.ADMISSION, Split.HELD_OUT):
            for index in train.values():
                assert compute_containment(index, mine[measured]) <= 0.02, (name, measured)


@pytest.mark.parametrize("domain", READERS)
def test_names_are_unique_and_reading_is_repeatable(documents, domain):
    found = [document.name for document in documents[domain]]
    assert len(set(found)) == len(found)
    assert not any(os.path.isabs(name) for name in found)
    if domain != "science":  # two seconds of parsing
        assert list(READERS[domain]()) == documents[domain]
    assert sum(len(d.text) for d in documents[domain]) < 1.2 * builtin.DOMAIN_CHARACTERS


def test_generated_headers_are_left_out(documents):
    assert not any("@generated" in document.text[:3_000] for document in documents["cpp"])
    assert not any("TORCH_STABLE_ONLY" in d.text.splitlines()[0] for d in documents["cpp"])


def test_absent_text_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda _: str(tmp_path))
    for domain in ("python", "cpp", "science"):
        with pytest.raises(CorpusError, match=f"Cannot read domain '{domain}': expected text in"):
            READERS[domain]()


def test_source_that_does_not_parse_is_passed_over(tmp_path, monkeypatch):
    package = tmp_path / "numpy"
    package.mkdir()
    words = " ".join(f"word{n}" for n in range(100))
    (package / "good.py").write_text(f'def f():\n    r"""{words} \\d"""\n')
    (package / "bad.py").write_text("def f(:\n")
    (package / "latin.py").write_bytes(b"# \xe9\n")
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda _: str(tmp_path))
    assert [document.name for document in read_science()] == ["numpy/good.py:1"]


def test_every_domain_is_registered():
    domains = load_plugins().domains
    assert {*READERS, "man-de", "man-pt-br", "man-tr", "man-uk"} <= set(domains.names())
    assert all(callable(domains.resolve(name)) for name in domains.names())


def test_readme_does_not_change_with_what_else_is_installed(documents, tmp_path, monkeypatch):
    installed = tmp_path / "later_dependency-1.0.dist-info"
    installed.mkdir()
    text = "Metadata-Version: 2.1\nName: later-dependency\nVersion: 1.0\n\n" + "Words. " * 400
    (installed / "METADATA").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert metadata.version("later-dependency") == "1.0"
    assert list(read_readme()) == documents["readme"]
