"""Files of every kind that people keep text in, as real files."""

import csv
import gzip
import hashlib
import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from molora_fed.corpus.documents import read_documents
from molora_fed.corpus.inventory import Inventory
from molora_fed.corpus.readers import KINDS
from molora_fed.corpus.records import TextOptions
from molora_fed.errors import CorpusError

CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
SHARED = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]
PARTS = [{"type": "text", "text": "Hi?"}]
PLAIN_CHAT = "User: Hi?\n\nAssistant: Hello."


def write_arrow(path, table):
    """As `Dataset.save_to_disk` writes it."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def read(path, **options):
    return [(d.name, d.text) for d in read_documents([path], TextOptions(**options))]


def refuse(path, *parts, **options):
    with pytest.raises(CorpusError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1_000
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "a", "content": "b", "messages": CHAT}, "a"),
        ({"content": "b", "id": 1}, "b"),
        ({"body": "b"}, "b"),
        ({"document": "b", "title": "t"}, "b"),
        ({"messages": CHAT, "content": "b"}, PLAIN_CHAT),
        ({"conversations": SHARED}, PLAIN_CHAT),
        ({"messages": [{"role": "user", "content": PARTS}]}, "User: Hi?"),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n\n1 2\n\n3"),
        ({"instruction": "Add.", "input": "", "output": "3"}, "Add.\n\n3"),
        ({"instruction": "Add.", "input": None, "output": "3"}, "Add.\n\n3"),
        ({"input": "1 2", "output": "3"}, "1 2\n\n3"),
        ({"prompt": "The sky is", "completion": " blue."}, "The sky is blue."),
        ({"prompt": "Why?", "response": "So."}, "Why?\n\nSo."),
        ({"question": "Why?", "answer": "So."}, "Why?\n\nSo."),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, PLAIN_CHAT),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".jsonl.gz", ".parquet", ".arrow"])
def test_fields_are_found_by_name_in_every_kind_of_record(tmp_path, record, text, kind):
    path = tmp_path / f"a{kind}"
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist([record]), path)
    elif kind == ".arrow":
        table = pa.Table.from_pylist([record])
        write_arrow(path, table)
    else:
        data = json.dumps([record] if kind == ".json" else record).encode()
        path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    assert read(path) == [(f"a{kind}:1", text)]


@pytest.mark.parametrize(
    ("field", "record", "text"),
    [
        ("note", {"note": "n", "text": "t"}, "n"),
        ("post.body", {"post": {"body": "n"}, "text": "t"}, "n"),
        ("post.body", {"post.body": "whole", "post": {"body": "n"}}, "whole"),
        ("dialog", {"dialog": SHARED}, PLAIN_CHAT),
    ],
)
@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_a_field_that_is_named_is_read(tmp_path, field, record, text, kind):
    path = tmp_path / f"a{kind}"
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist([record]), path)
    else:
        path.write_text(json.dumps(record))
    assert read(path, text_field=field) == [(f"a{kind}:1", text)]


@pytest.mark.parametrize(
    ("record", "field", "reason"),
    [
        ({"id": 1, "url": "x"}, "", "line 1: no field of text among id, url; name it with --text-"),
        ({"id": 1}, "a.b", "line 1: no field 'a.b' among id"),
        ({"a": {"b": 1}}, "a.b", "line 1: no text in field 'a.b' but int"),
        ({"messages": []}, "", "line 1: a chat of 0 messages"),
        ({"messages": ["x"]}, "", "line 1, message 1: no object but str"),
        ({"messages": [{"text": "x"}]}, "", "message 1: no 'role' with 'content', nor 'from'"),
        ({"messages": [{"role": "user", "content": 1}]}, "", "no text in its content but int"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "", "a part that is no"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "", "half a character"),
        ({"instruction": 5, "output": "x"}, "", "no text in field 'instruction' but int"),
        ({"prompt": "a", "completion": None}, "", "no text in field 'completion' but NoneType"),
    ],
)
def test_records_that_hold_no_text_say_so(tmp_path, record, field, reason):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    refuse(tmp_path / "a.jsonl", "a.jsonl", reason, text_field=field)


def test_json_is_a_list_one_record_or_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    assert read(path) == [("a.json:1", "a"), ("a.json:2", "b")]
    path.write_text(json.dumps({"text": "a"}, indent=1))
    assert read(path) == [("a.json:1", "a")]
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert read(path) == [("a.json:1", "a"), ("a.json:3", "b")]
    path.write_text('{"name": "a package"}')
    refuse(path, "record 1: no field of text among name")
    path.write_text('["a"]')
    refuse(path, "record 1: no JSON object but str")


@pytest.mark.parametrize(
    ("name", "data", "texts"),
    [
        ("a.csv", 'id,text\n1,"a, b\nc"\n2,d\n', ["a, b\nc", "d"]),
        ("a.csv", "\ufeffid;content\r\n1;a, b\r\n2;c\r\n", ["a, b", "c"]),
        ("a.csv", "instruction,output\nAdd 1 2.,3\n", ["Add 1 2.\n\n3"]),
        ("a.csv", 'text\n"say ""hi"""\n', ['say "hi"']),
        ("a.tsv", "id\ttext\n1\ta, b\n", ["a, b"]),
        ("a.tsv", 'id\ttext\n1\tsay "hi\n2\t"b\n', ['say "hi', '"b']),
    ],
)
def test_tables_have_a_header(tmp_path, name, data, texts):
    (tmp_path / name).write_bytes(data.encode())
    assert [text for _, text in read(tmp_path / name)] == texts


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("id,url\n1,x\n", "row 1: no field of text among id, url"),
        ("text,id\na\n", "row 1: 1 fields under 2 names"),
        ("text\na,b\n", "row 1: 2 fields under 1 names"),
        ("text,text\na,b\n", "two columns of one name"),
        ('text\n"a\n', "no table that can be read"),
    ],
)
def test_malformed_tables_are_refused(tmp_path, data, reason):
    (tmp_path / "a.csv").write_text(data)
    refuse(tmp_path / "a.csv", reason)


CELLS = st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from('\n",;\t'))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5), st.sampled_from(",;\t|"))
def test_what_csv_writes_is_read_back(tmp_path, rows, separator):
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=separator, lineterminator="\n")
    writer.writerows([("id", "text"), *rows])
    (tmp_path / "a.csv").write_bytes(stream.getvalue().encode())
    if any(text.strip() for _, text in rows):
        found = [text for _, text in read(tmp_path / "a.csv")]
        assert found == [text for _, text in rows if text.strip()]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_what_json_writes_is_read_back(tmp_path, texts, is_packed, is_ascii):
    lines = [json.dumps({"messages": [{"role": "user", "content": t}]}, ensure_ascii=is_ascii)
             for t in texts]  # fmt: skip
    data = "\n".join(lines).encode()
    path = tmp_path / ("a.jsonl.gz" if is_packed else "a.jsonl")
    path.write_bytes(gzip.compress(data) if is_packed else data)
    assert [text for _, text in read(path)] == [f"User: {text}" for text in texts]


def test_a_source_tree_is_read_by_endings(tmp_path):
    tree = tmp_path / "tree"
    names = ["a.py", "b.c", "b.h", "c.cpp", "d.js", "e.ts", "f.java", "g.go", "h.rs", "i.sh",
             "j.tex", "k.rst", "l.org", "m.yaml", "sub/n.PY"]  # fmt: skip
    for name in [*names, "o.o", "p.exe", "Makefile", "q.tar.gz"]:
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text(f"in {name}")
    inventory = Inventory()
    found = [(d.name, d.text) for d in read_documents([tree], inventory=inventory)]
    assert found == [(f"tree/{name}", f"in {name}") for name in sorted(names)]
    reasons = [row["reason"] for row in inventory.to_json()["left_out"]]
    assert reasons == [
        "a name without an ending", "ending '.exe' is not read", "ending '.o' is not read",
        "ending '.tar.gz' is not read",
    ]  # fmt: skip


def test_every_kind_of_text_may_be_packed(tmp_path):
    for suffix, kind in KINDS.items():
        path = tmp_path / f"a{suffix}.gz"
        path.write_bytes(gzip.compress(b'{"text": "x"}' if "JSON" in kind.label else b"text\nx"))
        if kind.is_text:
            assert "x" in read(path)[0][1]
        else:
            refuse(path, f"ending '{suffix}.gz' is not read")


def test_a_folder_of_save_to_disk_is_read_without_its_caches(tmp_path):
    for split in ("train", "test"):
        folder = tmp_path / "saved" / split
        folder.mkdir(parents=True)
        table = pa.table({"text": [f"{split} {n}" for n in range(3)], "n": [1, 2, 3]})
        for name in ("data-00000-of-00001.arrow", "cache-0123.arrow"):
            write_arrow(folder / name, table)
        for name in ("state.json", "dataset_info.json"):
            (folder / name).write_text("{}")
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [text for _, text in read(tmp_path / "saved" / "train")] == [
        "train 0", "train 1", "train 2",
    ]  # fmt: skip
    assert [text[:-2] for _, text in read(tmp_path / "saved")] == ["test"] * 3 + ["train"] * 3


def test_a_data_set_of_the_hub_is_read_in_a_process_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "datasets.py").write_text(
        "class Rows(list):\n"
        "    column_names = ['text', 'id']\n"
        "    def select_columns(self, names):\n"
        "        return [{n: row[n] for n in names} for row in self]\n"
        "def load_dataset(*names, split, revision):\n"
        "    if names[0] == 'no/such': raise ConnectionError('not in the cache\\nmore')\n"
        "    return Rows([{'text': f'{names} {split} {revision}', 'id': 1}])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name, text in {
        "datasets:a/b": "('a/b', None) train None",
        "datasets:a/b:test": "('a/b', None) test None",
        "datasets:a/b@1f:small:test": "('a/b', 'small') test 1f",
    }.items():
        assert read(Path(name)) == [(f"{name}:1", text)]
    refuse(Path("datasets:no/such"), "no data set that can be read (not in the cache)")


def test_without_the_package_one_line_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "datasets.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    refuse(Path("datasets:a/b"), "pip install 'molora-fed[datasets]'")


def make_usual_folder(root):
    """A folder of the four kinds that were read from the beginning."""
    random_ = random.Random(1)
    words = ["alpha", "beta é", "gamma\t", "数", "\u2028x", "\r\n", 'q"uote', "{json}", " "]

    def text():
        return " ".join(random_.choices(words, k=random_.randrange(1, 60))) + "\n"

    for folder in ("", "a", "a/b", "B", "z.d"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for n in range(3):
            (root / folder / f"t{n}.txt").write_bytes(text().encode())
            (root / folder / f"m{n}.MD").write_bytes(b"\xef\xbb\xbf" + text().encode())
            lines = [{"text": text(), "id": 10**30, "messages": [1], "x": 1.5} for _ in range(9)]
            data = "\n".join(map(json.dumps, lines))
            (root / folder / f"j{n}.jsonl").write_text(data)
            table = {"content": ["no"] * 300, "text": [text() for _ in range(300)]}
            pq.write_table(pa.table(table), root / folder / f"p{n}.parquet")
        (root / folder / ".h.txt").write_text("x")
        (root / folder / "e.txt").write_text(" \n")
        (root / folder / "x.png").write_text("x")
    return root


USUAL = "dd16a5ac00082054ddbb3c55ac1d129f7b34053229975d587269dfd92d1387b8"
"""Of names and texts, as read before other kinds of files were."""


def hash_documents(documents):
    pairs = [[document.name, document.text] for document in documents]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def test_text_that_was_always_read_gives_the_same_documents(tmp_path):
    folder = make_usual_folder(tmp_path / "usual")
    documents = list(read_documents([folder, folder / "a", folder / "t0.txt"]))
    assert hash_documents(documents) == USUAL
    assert not any(document.markup for document in documents)
