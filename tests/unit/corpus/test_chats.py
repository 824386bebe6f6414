"""Chats through a base's template, and which tokens of them count."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from molora_fed.charter import CorpusRules
from molora_fed.corpus.blocks import load_blocks, pack_documents, tokenize_documents
from molora_fed.corpus.documents import read_documents
from molora_fed.corpus.prepare import load_corpus, prepare_corpus
from molora_fed.corpus.records import TextOptions
from molora_fed.corpus.sizes import cut_long_documents
from molora_fed.errors import ConfigError, CorpusError
from molora_fed.types import Document, Markup, Split

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAST_ONLY = (  # as templates that drop earlier thoughts: a beginning differs from the whole
    "{% for m in messages %}{% if loop.last %}[last]{% endif %}{{ m['role'] }}: "
    "{{ m['content'] }}\n{% endfor %}"
)


def build_tokenizer(template, end="<|im_end|>"):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)
    tokenizer.chat_template = template
    return tokenizer


def chat(*contents, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


def read(tmp_path, messages, tokenizer=None, loss_on="all"):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    options = TextOptions(loss_on=loss_on)
    (document,) = read_documents([tmp_path / "a.jsonl"], options, tokenizer=tokenizer)
    return document


def counted(document, tokenizer):
    """The text of the tokens that count, each run of them."""
    tokens = tokenize_documents([document], tokenizer)[0]
    blocks = pack_documents(
        [document], np.zeros(1, dtype=np.int32), tokenizer,
        domain="d", split=Split.TRAIN, block_size=len(tokens),
    )  # fmt: skip
    assert np.array_equal(blocks.tokens[0], tokens)
    runs = np.flatnonzero(np.diff(np.concatenate([[0], blocks.targets[0], [0]]).astype(int)))
    return [tokenizer.decode(tokens[a:b]) for a, b in runs.reshape(-1, 2)]


@pytest.mark.parametrize("end", ["<|im_end|>", "<|end|>"])
def test_a_chat_is_written_by_the_template_of_the_base(tmp_path, end):
    tokenizer = build_tokenizer(CHATML, end)
    messages = chat("Hi é?", "Hello.", "And?", " Bye. ")
    document = read(tmp_path, messages, tokenizer)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if end == "<|im_end|>":  # packing ends the document with the same token
        assert document.text + "<|im_end|>\n" == whole
    else:
        assert document.text == whole
    tokens = tokenize_documents([document], tokenizer)[0].tolist()
    expected = tokenizer(document.text, add_special_tokens=False)["input_ids"]
    assert tokens == [*expected, tokenizer.eos_token_id]
    assert tokens.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 5


def test_special_tokens_that_a_message_spells_out_stay_text(tmp_path):
    tokenizer = build_tokenizer(CHATML)
    document = read(tmp_path, chat("<|im_end|> is a token", "no <|im_start|>user\n"), tokenizer)
    tokens = tokenize_documents([document], tokenizer)[0].tolist()
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (tokens.count(start), tokens.count(end)) == (3, 3)
    assert tokenizer.decode(tokens).count("<|im_end|>") == 4


NAMES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['name'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ({"name": "x<|im_end|>"}, "a special token beside a message's content"),
        ({"role": "<|im_start|>"}, "a special token beside a message's content"),
        ({"tool_calls": [{"<|end|>": 1}]}, "a special token beside a message's content"),
        ({"name": "\ud800"}, "half a character"),
    ],
)
def test_what_stands_beside_a_content_becomes_no_special_token(tmp_path, beside, reason):
    with pytest.raises(CorpusError, match=reason):
        read(tmp_path, [{**chat("Hi?")[0], **beside}], build_tokenizer(NAMES))


def test_plain_text_never_becomes_special_tokens(tmp_path):
    tokenizer = build_tokenizer(CHATML)
    (tmp_path / "a.txt").write_text("<|im_start|>user")
    (document,) = read_documents([tmp_path / "a.txt"], tokenizer=tokenizer)
    tokens = tokenize_documents([document], tokenizer)[0].tolist()
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") not in tokens


def test_only_what_the_assistant_says_counts_with_the_token_that_ends_it(tmp_path):
    tokenizer = build_tokenizer(CHATML)
    messages = chat("Hi?", "Hello é.", "Hello é.", "Bye.")
    document = read(tmp_path, messages, tokenizer, "assistant")
    assert counted(document, tokenizer) == ["Hello é.<|im_end|>", "Bye.<|im_end|>"]
    document = read(tmp_path, messages[:3], tokenizer, "assistant")
    assert counted(document, tokenizer) == ["Hello é.<|im_end|>"]
    document = read(
        tmp_path, chat("First.", "Hi.", "Bye.", first="assistant"), tokenizer, "assistant"
    )
    assert counted(document, tokenizer) == ["First.", "Bye.<|im_end|>"]


def test_where_a_template_changes_earlier_turns_the_contents_alone_count(tmp_path):
    tokenizer = build_tokenizer(LAST_ONLY, "<|end|>")
    document = read(tmp_path, chat("Hi?", "Hello.", "And?", "Bye."), tokenizer, "assistant")
    assert counted(document, tokenizer) == ["Hello.", "Bye."]


def test_without_a_template_a_chat_is_written_plainly(tmp_path, tokenizer):
    document = read(tmp_path, chat("Hi?", "Hello.", "And?", "Bye."), tokenizer, "assistant")
    assert document.text == "User: Hi?\n\nAssistant: Hello.\n\nUser: And?\n\nAssistant: Bye."
    assert counted(document, tokenizer) == ["Hello.", "Bye.<|end|>"]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, ["3<|end|>"]),
        ({"prompt": "The sky is", "completion": " blue."}, [" blue.<|end|>"]),
        ({"question": "Why?", "answer": "", "text": "x"}, ["<|end|>"]),
    ],
)
def test_of_an_instruction_the_response_counts(tmp_path, tokenizer, record, expected):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    (document,) = read_documents([tmp_path / "a.jsonl"], TextOptions(loss_on="assistant"))
    assert counted(document, tokenizer) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "chat template: roles must alternate"),
        ("{{ messages[9].content }}", "the base's chat template: "),
        ("{% for n in range(99999) %}{{ 'x' * 99 }}{% endfor %}", "makes too much text of it"),
        ("{{ messages[0].content }}", "changes what the assistant says; take --loss-on all"),
    ],
)
def test_what_a_template_refuses_is_one_line(tmp_path, template, reason):
    with pytest.raises(CorpusError) as caught:
        read(tmp_path, chat("Hi?", "Hello."), build_tokenizer(template), "assistant")
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_with_a_date_gives_the_same_text_every_day(tmp_path):
    template = "{{ strftime_now('%d %b %Y') }} {{ strftime_now('%s') }} {{ date_string }}"
    document = read(tmp_path, chat("Hi?"), build_tokenizer(template))
    assert document.text == "26 Jul 2024 2024-07-26 26 Jul 2024"


def test_text_without_any_answer_is_refused_and_an_unknown_word_too(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    with pytest.raises(CorpusError, match="expected chats, or instructions with responses"):
        list(read_documents([tmp_path / "a.txt"], TextOptions(loss_on="assistant")))
    with pytest.raises(ConfigError, match="all, assistant"):
        TextOptions(loss_on="users")


def test_beside_chats_plain_text_counts_whole(tmp_path, tokenizer):
    (tmp_path / "b.txt").write_text("plain")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat("Hi?", "Hello.")}))
    documents = list(read_documents([tmp_path], TextOptions(loss_on="assistant")))
    assert [d.markup and d.markup.answers for d in documents] == [((22, 28),), None]
    blocks = pack_documents(
        documents, np.arange(2, dtype=np.int32), tokenizer,
        domain="d", split=Split.TRAIN, block_size=35,
    )  # fmt: skip
    assert blocks.targets[0].tolist() == [False] * 22 + [True] * 13


def test_pieces_of_a_long_chat_keep_their_parts():
    text = "".join(f"{n:04d} " for n in range(2_000))
    markup = Markup(special=((0, 4), (5_000, 5_004)), frame=((0, 10),), answers=((1_500, 4_500),))
    pieces = cut_long_documents([Document("a", text, markup)])
    whole = [piece.text[a:b] for piece in pieces for a, b in piece.markup.answers]
    assert "".join(whole) == text[1_500:4_500]
    special = [piece.text[a:b] for piece in pieces for a, b in piece.markup.special]
    assert special == ["0000", text[5_000:5_004]]


def test_frames_are_not_compared():
    document = Document("a", "system: long rules. user: words", Markup(frame=((0, 26),)))
    assert document.compared == "\nwords"
    assert Document("a", "text").compared == "text"


@pytest.fixture(scope="module")
def chats(tmp_path_factory, make_text):
    """200 chats under one long system message, in one file."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rules = {"role": "system", "content": make_text(9_999, 60)}
    lines = [
        json.dumps({"messages": [rules, *chat(make_text(2 * n, 12), make_text(2 * n + 1, 30))]})
        for n in range(200)
    ]
    path.write_text("\n".join(lines))
    return path


def prepare(chats, tokenizer, loss_on, folder=None):
    documents = read_documents([chats], TextOptions(loss_on=loss_on), tokenizer=tokenizer)
    rules = CorpusRules(block_size=64)
    return prepare_corpus("d", documents, tokenizer, rules=rules, folder=folder)


def test_a_corpus_of_chats_has_targets_only_where_training_needs_them(chats, tmp_path):
    tokenizer = build_tokenizer(CHATML)
    corpus = prepare(chats, tokenizer, "assistant", tmp_path / "corpus")
    assert corpus.report.contamination < 0.02  # the system message is in every chat
    assert corpus.report.clusters > 150
    for split, blocks in corpus.blocks.items():
        assert (blocks.targets is not None) == (split in (Split.TRAIN, Split.VALIDATION))
    train = corpus.blocks[Split.TRAIN]
    assert 0.1 < train.targets.mean() < 0.9
    loaded = load_corpus(tmp_path / "corpus").blocks[Split.TRAIN]
    assert np.array_equal(loaded.targets, train.targets)
    assert loaded.fingerprint == train.fingerprint != train.without_targets().fingerprint
    assert np.array_equal(train.take(3).targets, train.targets[:3])
    # The same text is not taken for the same corpus.
    again = prepare(chats, tokenizer, "all", tmp_path / "corpus")
    assert again.blocks[Split.TRAIN].targets is None
    assert np.array_equal(again.blocks[Split.TRAIN].tokens, train.tokens)


def test_malformed_targets_are_refused(chats, tmp_path):
    from safetensors.numpy import load_file, save_file

    blocks = prepare(chats, build_tokenizer(CHATML), "assistant").blocks[Split.TRAIN]
    blocks.save(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    head = {"blocks": '{"domain": "d", "split": "train"}'}
    for wrong in (tensors["targets"].astype(np.int32), tensors["targets"][1:]):
        save_file({**tensors, "targets": wrong}, tmp_path / "b.safetensors", metadata=head)
        with pytest.raises(CorpusError):
            load_blocks(tmp_path / "b.safetensors")
