"""Good text of contributors, in files, folders and tables, and the functions that read it.

A parquet file may end the process that reads it, so the product reads each in one of its own. Here
a process reads many, without starting an interpreter for each, and is replaced where it ended.
"""

import contextlib
import faulthandler
import json
import os
import sys
from collections.abc import Sequence
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pyarrow
import pyarrow.parquet
from fuzz_folders import (
    MEMORY_BYTES,
    Run,
    encode_input,
    find_place,
    limit_memory,
    read_input,
    replacing,
    run_in_folder,
)

from molora_fed.corpus.documents import read_documents
from molora_fed.corpus.parquet import write_texts
from molora_fed.corpus.records import TextOptions

__all__ = [
    "TEXT_WORDS",
    "prepare_corpus",
    "prepare_parquet",
    "prepare_tables",
    "prepare_text_folders",
]


def prepare_corpus(suffix: str):
    def prepare(folder: Path) -> tuple[Sequence[bytes], Run]:
        path = folder / f"text{suffix}"
        texts = ["One document.", "Another, with ä and 数."]
        if suffix == ".jsonl":
            seeds = ["\n".join(json.dumps({"text": text}) for text in texts).encode()]
        else:
            seeds = [text.encode() for text in texts]
        return seeds, replacing(path, lambda: list(islice(read_documents([path]), 10_000)))

    return prepare


def prepare_text_folders(folder: Path) -> tuple[Sequence[bytes], Run]:
    def read(place: Path, value: dict[str, Any]) -> None:
        names = value.get("paths")
        paths = [find_place(name, place) for name in (names if isinstance(names, list) else ())]
        list(islice(read_documents([path for path in paths if path is not None]), 10_000))

    lines = [{"text": "One document.", "id": 1}, {"text": "Another."}, ""]
    files = {
        "texts/a.txt": "One document.", "texts/b/c.md": "# Another", "texts/b/.d.txt": "hidden",
        "texts/.e/f.txt": "hidden", "texts/g.bin": {"base64": "AAAA"}, "h.jsonl": {"lines": lines},
        "texts/i.txt": {"link": "a.txt"}, "j/a.txt": {"link": "../texts/a.txt"},
        "k.txt": {"lines": ["a", ""], "size": 0}, "texts/l.jsonl": {"lines": lines},
    }  # fmt: skip
    seeds = [encode_input(files, paths=["texts", "h.jsonl"]), encode_input(files, paths=["k.txt"])]
    return seeds, run_in_folder(folder, read, most=2**20)


TEXT_WORDS = (
    "texts", "texts/a.txt", "j", "j/a.txt", "h.jsonl", "texts/g.bin", "link", "folder", "size",
    "base64", "lines", "text", "/etc/hostname", "../j", "b", "missing.txt",
)  # fmt: skip


def prepare_parquet(folder: Path) -> tuple[Sequence[bytes], Run]:
    path, reader = folder / "text.parquet", _Reader(folder / "answers")
    seeds = []
    for options in ({}, {"use_dictionary": False, "compression": "gzip"}, {"row_group_size": 1}):
        table = pyarrow.table({"text": ["One document.", "Another, with ä and 数."]})
        pyarrow.parquet.write_table(table, path, **options)
        seeds.append(path.read_bytes())
    return seeds, replacing(path, lambda: reader.read(path))


def prepare_tables(folder: Path) -> tuple[Sequence[bytes], Run]:
    """Parquet files by what is in them: columns, how often they are repeated, how written."""
    path, reader = folder / "text.parquet", _Reader(folder / "answers")

    def run(data: bytes) -> None:
        value = read_input(data)
        path.unlink(missing_ok=True)
        # Whatever is no table that can be written; what can be read is not decided here.
        with contextlib.suppress(Exception):
            columns, options = value["columns"], value["options"]
            times = min(value["times"], 2_000, 2**24 // len(data))
            table = {name: list(values) * times for name, values in columns.items()}
            pyarrow.parquet.write_table(pyarrow.table(table), path, **options)
        reader.read(path)

    texts = ["One document.", "Another, with ä and 数."]
    seeds = [
        {"columns": {"text": texts, "n": [1, None]}, "times": 2, "options": {"row_group_size": 2}},
        {
            "columns": {"text": ["x" * 5_000]},
            "times": 2,
            "options": {"use_dictionary": False, "compression": "gzip"},
        },
    ]
    return [json.dumps(seed).encode() for seed in seeds], run


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

    def read(self, path: Path) -> None:
        """Read all documents of a file."""
        here = SimpleNamespace(Popen=self._open, DEVNULL=None, PIPE=None)
        with patch("molora_fed.corpus.parquet.subprocess", here):
            list(read_documents([path]))

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
