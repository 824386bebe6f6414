"""Good folders of text, of every kind of file and record, as inputs of the fuzzing."""

import base64
import json
from typing import Any

import pyarrow
import pyarrow.ipc
from fuzz_folders import encode_input

__all__ = ["TEXT_WORDS", "list_folders"]

TEXT_WORDS = (
    "texts", "texts/a.txt", "j", "j/a.txt", "h.jsonl", "texts/g.bin", "link", "folder", "size",
    "base64", "lines", "text", "/etc/hostname", "../j", "b", "missing.txt", "gzip", "encoding",
    "times", "utf-16", "utf-32", "cp1252", "koi8_r", "cp932", "utf-7", "a.json", "a.csv", "a.tsv",
    "a.html", "a.py", "a.txt.gz", "a.arrow", "a.parquet", "datasets:x", "~nobody", "messages",
    "conversations", "role", "content", "from", "value", "user", "assistant", "system", "gpt",
    "prompt", "instruction", "input", "output", "completion", "chosen", "a.b", "tool_calls",
    "chatml", "names", "name", "clock", "last", "upper", "fails", "much", "plain", "all",
    "<|im_end|>", "<|end|>",
    "<p>", "<pre>", "<!--", "</script>", "<script>", "charset=koi8-r", ",", ";", "\t", '"', "\r\n",
)  # fmt: skip


def _say(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)]


_CHAT = {
    "messages": [{"role": "system", "content": "Be kind."}, *_say("Hi?", "Hello.", "A?", "B.")]
}
_SHARED = {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]}
_PARTS = {"messages": _say([{"type": "text", "text": "Hi"}, "?"], "", "<|im_end|> is", " <|end|>")}
_TOOLS = {"messages": [*_say("Hi?"), {"role": "assistant", "content": None, "tool_calls": [1]},
                       {"role": "function", "content": "1", "name": None}]}  # fmt: skip
_INSTRUCTIONS = (
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Add.", "input": "", "output": "3"},
    {"prompt": "A", "completion": " b"},
    {"context": "A b.", "answer": "c"},
    {"prompt": _say("Hi?"), "completion": _say("Hi?", "Hello.")[1:]},
)


def _build_arrow() -> dict[str, str]:
    """What `Dataset.save_to_disk` leaves: a stream."""
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"text": ["One document.", "Another."], "n": [1, 2]})
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return {"base64": base64.b64encode(sink.getvalue().to_pybytes()).decode()}


def list_folders() -> list[bytes]:
    """Folders that can be read, and some that are refused."""
    return [*_list_layouts(), *_list_records(), *_list_pages()]


def _list_layouts() -> list[bytes]:
    lines = [{"text": "One document.", "id": 1}, {"text": "Another."}, ""]
    files = {
        "texts/a.txt": "One document.", "texts/b/c.md": "# Another", "texts/b/.d.txt": "hidden",
        "texts/.e/f.txt": "hidden", "texts/g.bin": {"base64": "AAAA"}, "h.jsonl": {"lines": lines},
        "texts/i.txt": {"link": "a.txt"}, "j/a.txt": {"link": "../texts/a.txt"},
        "k.txt": {"lines": ["a", ""], "size": 0}, "texts/l.jsonl": {"lines": lines},
        "texts/m": {"link": "b"}, "texts/n": "x", "texts/o.bin.gz": "x", "texts/p.txt": "  ",
        "texts/q.py": "a = 1", "texts/r.txt": {"folder": 1}, "texts/s.txt": {"link": "missing"},
    }  # fmt: skip
    arrow = _build_arrow()
    saved = {"set/data-00000-of-00001.arrow": arrow, "set/state.json": "{}",
             "set/dataset_info.json": "{}", "set/cache-1.arrow": arrow}  # fmt: skip
    many = {f"m/a.{n}x": "x" for n in range(33)}
    packed = {"a.txt.gz": {"gzip": "One document."}, "b.txt.gz": "no gzip",
              "c.txt.gz": {"gzip": {"text": "a", "times": 6 * 2**20}}}  # fmt: skip
    return [
        encode_input(files, paths=["texts", "h.jsonl"]),
        encode_input(files, paths=["k.txt"]),
        encode_input(files, paths=["texts", "texts/a.txt", "k.txt", "k.txt", "j"]),
        encode_input(files, paths=["j", "missing", "texts/n", "texts/g.bin", "~nobody/x"]),
        encode_input(files, paths=["h.jsonl"] * 7, text_field="id"),
        encode_input({"a/b.txt": "x", "c/b.txt": "x", "d/e.bin": ""}, paths=["a", "c/b.txt", "d"]),
        encode_input({"a/b.txt": "x", "c/b.txt": "x"}, paths=["a/b.txt", "c/b.txt"]),
        encode_input({"a": {"folder": 1}}, paths=["a"]),
        encode_input({"a.txt": " ", "b.py": ""}, paths=["a.txt", "b.py"]),
        encode_input({"l": {"link": "l"}, "l.txt": {"link": "l.txt"}}, paths=["l", "l.txt"]),
        encode_input(many, paths=["m"]),
        encode_input(saved, paths=["set"]),
        encode_input({"a.arrow": arrow, "b.parquet": arrow, "c.parquet": "no"},
                     paths=["a.arrow", "b.parquet", "c.parquet"]),
        encode_input({"a.arrow": arrow}, paths=["a.arrow"], text_field="x.y"),
        encode_input(packed, paths=["a.txt.gz"]),
        encode_input(packed, paths=["b.txt.gz", "c.txt.gz"]),
        encode_input({}, paths=["datasets:x@1:y:train"]),
        encode_input({}, paths=[]),
    ]  # fmt: skip


def _list_records() -> list[bytes]:
    """Records of every form, in JSON lines, JSON and tables, with every template."""
    found = []
    tools = [{"function": {"name": "<|end|>"}}]
    special = {"messages": _say("<|im_end|> ab", "c<|end|>")}
    named = {"messages": [{**one, "name": "\ud800"} for one in _say("a", "b")]}
    for tokenizer in (
        "none",
        "names",
        "plain",
        "chatml",
        "names",
        "name",
        "clock",
        "last",
        "upper",
        "fails",
        "much",
    ):
        for record in (_CHAT, _PARTS, special, named):
            lines = {"lines": [record, _SHARED]}
            found.append(
                encode_input({"a.jsonl": lines}, paths=["a.jsonl"], loss_on="assistant",
                             tokenizer=tokenizer)
            )  # fmt: skip
    broken: tuple[Any, ...] = (
        {"messages": []}, {"messages": [{**_say("a")[0], "tool_calls": tools}]},
        {"messages": [1]}, {"messages": [{"content": "a"}]},
        {"messages": [{"role": "user", "content": 1}]}, {"messages": [{"role": "u\ud800"}]},
        {"messages": [{"role": "u\ud800", "content": "a"}]}, {"messages": _say([{"a": 1}])},
        {"text": 1}, {"text": "\ud800"}, {"id": 1}, 1, {"output": "a"},
        {"prompt": 1, "output": "a"},
    )  # fmt: skip
    found += [
        encode_input({"a.json": {"json": [one]}}, paths=["a.json"], tokenizer="names")
        for one in broken
    ]
    for record in (*_INSTRUCTIONS, _TOOLS, {"content": "a"}, {"body": _say("a", "b")}):
        for loss_on in ("all", "assistant"):
            found.append(
                encode_input({"a.json": {"json": [record]}}, paths=["a.json"], loss_on=loss_on,
                             tokenizer="chatml")
            )  # fmt: skip
    nested = {"a": {"b": "One.", "c": _say("Hi?", "Hello.")}, "d.e": "Two."}
    for field in ("a.b", "a.c", "d.e", "a.x", "f"):
        found.append(
            encode_input({"a.json": {"json": nested}}, paths=["a.json"], text_field=field)
        )  # fmt: skip
    wide = {f"k{n}": n for n in range(20)}
    deep: Any = "a"
    for _ in range(300):
        deep = [deep]
    return [
        *found,
        encode_input({"a.jsonl": {"lines": [wide]}}, paths=["a.jsonl"]),
        encode_input({"a.jsonl": {"lines": ["{", "", json.dumps({"text": deep})]}},
                     paths=["a.jsonl"]),
        encode_input({"a.jsonl": "{\"text\": \"a\", \"n\": " + "1" * 40 + ", \"f\": 1." + "1" * 40
                      + "}"}, paths=["a.jsonl"]),
        encode_input({"a.json": {"lines": [_CHAT, _SHARED]}}, paths=["a.json"]),
    ]  # fmt: skip


def _list_pages() -> list[bytes]:
    """Tables, pages and encodings."""
    page = (
        "<!DOCTYPE html><meta charset=koi8-r><title>A &amp; B</title><!-- x --><!--><p id='a>b' "
        'c"d>One<br>two</p><pre>\n a\n\n  b</pre><script>a < b</script ><td>1<td>2<td></ ><?x?>'
        '<![CDATA[x]]>1 < 2<p a="x" b=\'y<textarea><b></textareas></textarea>\u0130<svg>'
    )
    tables = {
        "a.csv": 'text;b\n"One ""x"".";1\n"Two\nlines";2\n\n', "b.csv": "text,text\n1,2",
        "c.csv": "text,b\n1", "d.csv": 'text\n"a"b', "e.tsv": 'text\tb\n"One\t2',
        "f.tsv": "text\tb\nOne\t2", "g.csv": "", "h.csv": "instruction,response\na,b",
        "i.tab": "a\nb",
    }  # fmt: skip
    cyrillic = "Это обычный русский текст, который написан для проверки."
    coded: dict[str, Any] = {
        "a.txt": {"text": "Grüße, große Äpfel überall und öfter", "encoding": "cp1252"},
        "b.txt": {"text": cyrillic, "encoding": "koi8_r"},
        "c.txt": {"text": "これは日本語の文章です。", "encoding": "cp932"},
        "d.txt": {"text": "a", "encoding": "utf-16"}, "e.txt": {"text": "a", "encoding": "utf-32"},
        "f.txt": {"base64": "//4A"}, "g.txt": {"base64": "YQBi"}, "h.txt": {"base64": "gY2QAf8="},
        "i.html": {"text": page + cyrillic, "encoding": "koi8_r"},
        "j.html": {"text": page.replace("koi8-r", "latin-1") + "é", "encoding": "cp1252"},
        "k.html": {"text": page.replace("koi8-r", "nothing") + "é", "encoding": "cp1252"},
        "l.html": {"text": page.replace("koi8-r", "utf-7") + "é", "encoding": "cp1252"},
        "m.html": page, "n.html": page.replace("\u0130", "") + "<b x='", "o.html": "<pre>a",
        "p.txt": {"text": "Grüße\n", "encoding": "cp1252", "times": 20_000},
        "q.txt": {"base64": "YQphYf9h"}, "s.txt": {"text": "a" * 300, "times": 6_000},
        "t.txt": {"gzip": {"base64": "AAA="}}, "u.html": "<script>a</scripts>b</script>c<p></p> ",
        "r.txt": {"base64": "AABhYQ=="},
    }  # fmt: skip
    return [
        *(encode_input({name: entry}, paths=[name]) for name, entry in tables.items()),
        encode_input({f"t/{name}": entry for name, entry in tables.items()}, paths=["t"]),
        *(encode_input({name: entry}, paths=[name]) for name, entry in coded.items()),
        encode_input({f"t/{name}": entry for name, entry in coded.items()}, paths=["t"]),
    ]
