"""`molora train` on the text people have: what is read, what is left out, what is learned of it."""

import json
import random

import numpy as np
import pytest

from molora_fed.contributions.manifest import load_contribution
from molora_fed.corpus.batches import take_batch
from molora_fed.corpus.prepare import load_corpus
from molora_fed.models.base import load_base
from molora_fed.training import language_model
from molora_fed.types import Split


@pytest.fixture
def chats(tmp_path):
    """Users speak in the letters w to z, assistants in a to d; and a file that is no text."""
    source, folder = random.Random(1), tmp_path / "chats"
    folder.mkdir()

    def say(letters, words):
        return " ".join(
            "".join(source.choice(letters) for _ in range(source.randint(2, 6)))
            for _ in range(words)
        )

    lines = [
        {"messages": [
            {"role": role, "content": say(letters, 12)}
            for role, letters in (("user", "wxyz"), ("assistant", "abcd")) * 2
        ]}
        for _ in range(200)
    ]  # fmt: skip
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "photo.png").write_bytes(b"\x89PNG")
    (folder / "broken.txt").write_bytes(b"\0")
    return folder


@pytest.fixture
def train(molora, setup, tmp_path, chats):
    def call(*more, out="out"):
        return molora(
            "train", "--cooperative", setup.cooperative, "--domain", "chats", "--data", chats,
            "--out", tmp_path / out, "--threads", 1, *more,
        )  # fmt: skip

    return call


def test_with_the_loss_on_the_assistant_no_token_of_the_user_has_a_gradient(
    train, tmp_path, setup, monkeypatch
):
    gradients, compute = {}, language_model._BlockLoss.__call__

    def watch(losses, step):
        def keep(module, args, output):
            states = output.last_hidden_state  # each is moved by its own prediction alone
            states.register_hook(lambda g: gradients.update({step: g.abs().sum(-1) > 0}))

        with losses.head.decoder.register_forward_hook(keep):
            yield from compute(losses, step)

    monkeypatch.setattr(language_model._BlockLoss, "__call__", watch)
    ran = train("--loss-on", "assistant")
    assert (ran.code, ran.err.count("error")) == (0, 0), ran.err
    blocks = load_corpus(tmp_path / "out" / "corpus").blocks[Split.TRAIN]
    tokenizer = load_base(setup.cooperative / "base").tokenizer
    said = tokenizer.decode(blocks.tokens[blocks.targets])
    assert set(said) <= set("abcd ") | set(tokenizer.eos_token)
    assert set("wxyz") & set(tokenizer.decode(blocks.tokens[~blocks.targets]))
    record = load_contribution(tmp_path / "out" / "contribution").manifest.training
    settings = record["settings"]
    assert len(gradients) == settings["steps"]
    for step, gradient in gradients.items():
        rows = take_batch(blocks.targets, step, batch=settings["batch"], seed=settings["seed"])
        assert np.array_equal(gradient.numpy(), rows[:, 1:])
    assert (record["loss_on"], record["num_train_targets"]) == (
        "assistant", int(blocks.targets.sum()),
    )  # fmt: skip
    # What is sent, and what is measured for others, is over all tokens.
    samples = (tmp_path / "out" / "contribution").rglob("*.safetensors")
    assert not any(b'"targets"' in path.read_bytes() for path in samples)


def test_what_was_read_and_left_out_is_shown_and_kept(train, tmp_path):
    ran = train()
    assert ran.code == 0
    for shown in ("JSON lines", "200", "binary data", "broken.txt", "ending '.png' is not read"):
        assert shown in ran.out
    report = json.loads((tmp_path / "out" / "corpus" / "corpus.json").read_text())["report"]
    assert report["files"]["read"][0]["names"] == ["chats/chats.jsonl"]
    assert len(report["files"]["left_out"]) == 2
    record = load_contribution(tmp_path / "out" / "contribution").manifest
    assert "loss_on" not in record.training
    assert b"chats.jsonl" not in record.canonical  # names of files are the contributor's own


def test_another_loss_is_another_training(train):
    assert train().code == 0
    again = train("--loss-on", "assistant")
    assert again.code and "differs in loss_on, train_targets, num_train_targets" in again.err


def test_documents_apart_are_in_the_record_and_the_memory_is_said(train, tmp_path):
    ran = train("--reset-documents")
    assert ran.code == 0, ran.err
    assert "Training needs about" in ran.err and "are free" in ran.err
    record = load_contribution(tmp_path / "out" / "contribution").manifest.training
    assert record["reset_documents"] is True
    again = train()
    assert again.code and "differs in reset_documents, train_starts" in again.err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--text-field", "body"), "no field 'body' among messages"),
        (("--loss-on", "user"), "'user' is not one of"),
    ],
)
def test_a_wrong_option_is_one_error(train, options, reason):
    ran = train(*options)
    assert ran.code and reason in ran.err


def test_text_check_shows_the_same_without_training(molora, chats):
    ran = molora("text", "check", chats, "--loss-on", "assistant")
    assert (ran.code, ran.err) == (0, "")
    for shown in ("JSON lines", "binary data", "chats/chats.jsonl:1 begins:\nUser: "):
        assert shown in ran.out
    refused = molora("text", "check", chats / "broken.txt")
    assert refused.code == 12 and refused.err.count("\n") == 1


@pytest.mark.processes
def test_two_launched_processes_make_the_contribution_that_one_makes(train, tmp_path):
    launcher = "accelerate launch --multi_gpu --num_processes 2 --main_process_port 0"
    more = ("--loss-on", "assistant", "--device", "cpu")
    ran = train(*more, "--launcher", launcher)
    assert ran.code == 0, ran.err
    assert train(*more, out="one").code == 0
    two, one = (
        load_contribution(tmp_path / out / "contribution").manifest for out in ("out", "one")
    )
    assert two.training["processes"] == 2 and "processes" not in one.training
    assert two.training["train_targets"] == one.training["train_targets"]
    assert two.specialist_loss == pytest.approx(one.specialist_loss, abs=1e-4)
    assert "launcher" not in json.dumps(two.training)
