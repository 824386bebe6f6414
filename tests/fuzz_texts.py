"""Good text of contributors, in files, folders and tables, and the functions that read it.

A parquet file may end the process that reads it, so the product reads each in one of its own. Here
a process reads many, without starting an interpreter for each, and is replaced where it ended.
"""

import contextlib
import faulthandler
import gzip
import json
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
from fuzz_folders import (
    MEMORY_BYTES,
    Run,
    find_place,
    limit_memory,
    read_input,
    refuse_in_one_line,
    replacing,
    run_in_folder,
)
from fuzz_records import TEXT_WORDS, list_folders
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from molora_fed.corpus.documents import read_documents
from molora_fed.corpus.inventory import Inventory
from molora_fed.corpus.parquet import write_texts
from molora_fed.corpus.records import TextOptions
from molora_fed.types import Markup

__all__ = [
    "TEXT_WORDS",
    "prepare_corpus",
    "prepare_parquet",
    "prepare_tables",
    "prepare_text_folders",
]


def prepare_corpus(suffix: str):
    """A file by its bytes; the loss on the assistant, where the file may have one."""

    def prepare(folder: Path) -> tuple[Sequence[bytes], Run]:
        path = folder / f"text{suffix}"
        return _SEEDS[suffix], replacing(path, lambda: read_all([path], TextOptions()))

    return prepare


_TEXTS = ("One document.", "Another, with ä and 数.")
_PAGE = """<!DOCTYPE html><html><head><meta charset="utf-8"><title>A &amp; B</title>
<style>p {}</style><!-- x --></head><body><p class="a>b" id='c'>One<br>two</p><pre>
 a
  b</pre><script>if (a < b) {}</script><table><tr><td>1<td>2</table><![CDATA[x]]><?php ?> 1 < 2
<textarea><b></textarea></ ><!--><svg><a></svg><li>"""
_TABLE = 'text;b\n"One ""document"".";1\n"Two\nlines.";2\n\n'
_SEEDS: dict[str, list[bytes]] = {
    ".txt": [
        *(text.encode() for text in _TEXTS),
        "é".encode("cp1252"), "Grüße, große Äpfel überall".encode("cp1252"),
        "Это обычный русский текст.".encode("koi8_r"), "これは日本語です。".encode("cp932"),
        *("A ä.".encode(name) for name in ("utf-8-sig", "utf-16", "utf-32")),
    ],
    ".jsonl": [
        "\n".join(json.dumps({"text": text}) for text in _TEXTS).encode(),
        json.dumps({"messages": [{"role": "user", "content": "Hi?"}]}).encode(),
        b'{"prompt": "a", "completion": " b", "n": [1, 2.5]}\n\n{"instruction": "a", "output": ""}',
    ],
    ".json": [json.dumps([{"text": text} for text in _TEXTS]).encode(),
              b'{"content": "One."}\n{"content": "Two."}'],
    ".csv": [_TABLE.encode(), b"text,a\nOne.,1\n"],
    ".tsv": [b"text\ta\nOne\t1\n", b'text\ta\n"One\t1\n'],
    ".html": [_PAGE.encode(), _PAGE.replace("utf-8", "latin-1").encode("cp1252", "replace")],
    ".txt.gz": [gzip.compress(text.encode(), mtime=0) for text in _TEXTS],
}  # fmt: skip


def read_all(paths: Sequence[Path], options: TextOptions, tokenizer: Any = None) -> None:
    """Read paths, and hold what comes against what is promised of it.

    A refusal comes after the table of what was read is written, as users get both.
    """
    inventory = Inventory()
    documents = read_documents(paths, options, tokenizer=tokenizer, inventory=inventory)
    try:
        for document in islice(documents, 10_000):
            document.text.encode()
            markup = document.markup or Markup()
            for spans in (markup.special, markup.frame, markup.answers or ()):
                ends = [0, *(place for span in spans for place in span), len(document.text)]
                assert ends == sorted(ends), "parts of a text that are not in order"
    finally:
        json.dumps(inventory.to_json())
        assert "\n" not in inventory.describe_left_out()


def prepare_text_folders(folder: Path) -> tuple[Sequence[bytes], Run]:
    """Folders of files of every kind, read with every option; most hold something that is refused.

    A folder that is refused is one line here already, so that seeds may be refused.
    """
    reader = _Reader(folder / "answers")
    tokenizers = {name: _build_tokenizer(template) for name, template in _TEMPLATES.items()}

    def read(place: Path, value: dict[str, Any]) -> None:
        names = value.get("paths")
        paths = [_find_source(name, place) for name in (names if isinstance(names, list) else ())]
        loss_on = "assistant" if value.get("loss_on") == "assistant" else "all"
        text_field = str(value.get("text_field") or "")
        options = TextOptions(text_field, loss_on)
        tokenizer = tokenizers.get(str(value.get("tokenizer")))
        with reader.standing_in():
            found = [path for path in paths if path is not None]
            refuse_in_one_line(lambda: read_all(found, options, tokenizer))

    return list_folders(), run_in_folder(folder, read, most=2**23)


def _find_source(name: object, place: Path) -> Path | None:
    if isinstance(name, str) and name.startswith(("datasets:", "~")) and "\0" not in name:
        return Path(name)
    return find_place(name, place)


_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEMPLATES: dict[str, str | None] = {
    "plain": None,
    "chatml": _CHATML,
    "clock": "{{ strftime_now('%d %b %Y') }} " + _CHATML,
    "last": "{% for m in messages %}{% if loop.last %}[last]{% endif %}{{ m['role'] }}: "
    "{{ m['content'] }}\n{% endfor %}",
    "upper": "{% for m in messages %}{{ m['content'] | upper }}<|end|>{% endfor %}",
    "names": "{% for m in messages %}{{ m['role'] }} {{ m['name'] }} {{ m | tojson }}: "
    "{{ m['content'] }}<|im_end|>\n{% endfor %}",
    "fails": "{{ raise_exception('no such role') }}",
    "much": "{% for n in range(2000) %}{{ messages[0]['role'] * 1000 }}{% endfor %}",
}
"""Templates that a base may have, by what is special about them."""


def _build_tokenizer(template: str | None) -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if template is not None and template != _TEMPLATES["last"]:
        backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|end|>"])
    end = "<|im_end|>" if template is not None and "<|im_end|>" in template else "<|end|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)
    if template == _TEMPLATES["last"]:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = template
    return tokenizer


def prepare_parquet(folder: Path) -> tuple[Sequence[bytes], Run]:
    """Parquet and arrow files by their bytes; which one it is, their content says."""
    path, reader = folder / "text.parquet", _Reader(folder / "answers")
    seeds = []
    for options in ({}, {"use_dictionary": False, "compression": "gzip"}, {"row_group_size": 1}):
        pyarrow.parquet.write_table(pyarrow.table({"text": list(_TEXTS)}), path, **options)
        seeds.append(path.read_bytes())
    for form in ("stream", "file"):
        _write_arrow(pyarrow.table({"text": list(_TEXTS), "n": [1, 2]}), path, form)
        seeds.append(path.read_bytes())
    return seeds, replacing(path, lambda: reader.read(path))


def _write_arrow(table: Any, path: Path, form: str) -> None:
    opened = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
    with path.open("wb") as file, opened(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)


def prepare_tables(folder: Path) -> tuple[Sequence[bytes], Run]:
    """Tables by what is in them: columns, how often they are repeated, how written and read."""
    path, reader = folder / "text.parquet", _Reader(folder / "answers")

    def run(data: bytes) -> None:
        value = read_input(data)
        path.unlink(missing_ok=True)
        # Whatever is no table that can be written; what can be read is not decided here.
        with contextlib.suppress(Exception):
            columns, written = value["columns"], value["options"]
            times = min(value["times"], 2_000, 2**24 // len(data))
            table = pyarrow.table({n: list(values) * times for n, values in columns.items()})
            if value.get("form") in ("stream", "file"):
                _write_arrow(table.slice(0, 500), path, value["form"])
            else:
                pyarrow.parquet.write_table(table, path, **written)
        loss_on = "assistant" if value.get("loss_on") == "assistant" else "all"
        options = TextOptions(str(value.get("text_field") or ""), loss_on)
        refuse_in_one_line(lambda: reader.read(path, options))

    chats = [[{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]] * 2
    seeds: list[dict[str, Any]] = [
        {"columns": {"text": _TEXTS, "n": [1, None]}, "times": 2, "options": {"row_group_size": 2}},
        {
            "columns": {"text": ["x" * 5_000]},
            "times": 2,
            "options": {"use_dictionary": False, "compression": "gzip"},
        },
        {"columns": {"messages": chats, "id": [1, 2]}, "times": 1, "loss_on": "assistant"},
        {"columns": {"text": _TEXTS, "n": [1, 2]}, "times": 1, "form": "file"},
        {"columns": {"text": ["x" * 1_000] * 20}, "times": 600, "form": "parquet"},
        {"columns": {"content": _TEXTS, "prompt": _TEXTS}, "times": 1},
        {"columns": {"a": [{"b": "One."}, {"b": "Two."}]}, "times": 1, "form": "stream",
         "text_field": "a.b"},
    ]  # fmt: skip
    return [json.dumps({"options": {}, **seed}).encode() for seed in seeds], run


class _Reader:
    """Reads parquet files in another process, as `molora_fed.corpus.parquet` does.

    Between it and here a third process starts it again: forked before anything has threads or locks
    that a fork would miss. So make a reader before pyarrow is used for anything else.

    Args:
        answers: File for what that process answers.
    """

    def __init__(self, answers: Path) -> None:
        self._answers = answers
        self._asked, asking = Pipe()
        if not os.fork():
            try:
                self._asked.close()
                _supervise(asking, answers)  # until nobody asks
            finally:
                os._exit(1)
        asking.close()

    def read(self, path: Path, options: TextOptions | None = None) -> None:
        """Read all documents of a file."""
        with self.standing_in():
            read_all([path], options or TextOptions())

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[None]:
        """Whatever starts a reader meanwhile asks this one."""
        here = SimpleNamespace(Popen=self._open, DEVNULL=None, PIPE=None)
        with patch("molora_fed.corpus.parquet.subprocess", here):
            yield

    def _open(self, command: Sequence[str], **_: object) -> SimpleNamespace:
        """Stands in for a process: what it said is in a file, its status is known."""
        self._asked.send(tuple(command[-4:]))  # source, characters, field, tokens that count
        status = self._asked.recv()
        answers = self._answers.open("rb")
        return SimpleNamespace(stdout=answers, kill=lambda: None, wait=lambda: status)


def _supervise(asking: Connection, answers: Path) -> None:
    """Pass on what is asked, and say with which status it was read."""
    faulthandler.disable()  # that a reader ends by a signal is no news
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    limit_memory(4 * MEMORY_BYTES)  # pyarrow reserves addresses that it does not use
    child = 0
    while True:
        question = asking.recv()
        answers.write_bytes(b"")
        if not child:
            passed, passing = Pipe()
            child = os.fork()
            if not child:
                asking.close()
                passed.close()
                _serve(passing, answers)
            passing.close()
        try:
            passed.send(question)
            passed.recv()
            status = 0
        except (EOFError, OSError):
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            child = 0
        asking.send(status)


def _serve(asking: Connection, answers: Path) -> None:
    sys.modules["datasets"] = None  # type: ignore[assignment]  # nothing asks the Hub
    while True:
        path, most, *options = asking.recv()
        with contextlib.suppress(BaseException), answers.open("wb") as stream:
            write_texts(Path(path), int(most), stream, TextOptions(*options))
        _save_coverage()
        asking.send(True)


def _save_coverage() -> None:
    """Save what is measured in this process, if anything is; it may end with the next file."""
    if "coverage" in sys.modules:
        measured = sys.modules["coverage"].Coverage.current()
        if measured is not None:
            measured.save()
