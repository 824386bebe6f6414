"""docs/text.md lists the endings and fields that are read."""

import re
from pathlib import Path

from molora_fed.corpus import chats, raw_text, readers, records

PAGE = (Path(__file__).parents[2] / "docs" / "text.md").read_text(encoding="utf-8")


def test_every_ending_is_listed():
    rows = re.findall(r"^\| [^|]+ \| (`\..*?) \|", PAGE, re.MULTILINE)
    assert {ending for row in rows for ending in row.strip("`").split()} == readers.KINDS.keys()


def test_every_field_is_named():
    fields = {
        *records._TEXT, *records._CHATS, *records._PROMPTS, *records._CONTEXTS,
        *records._RESPONSES, *records._TEXTS,
    }  # fmt: skip
    assert all(f"`{field}`" in PAGE for field in fields)


def test_bounds_are_the_ones_in_force():
    assert raw_text.MAX_FILE_BYTES == 16 * 2**30 and "16 GiB" in PAGE
    assert raw_text.UNPACKED_RATIO == 200 and raw_text.SPARE == 4 * 2**20
    assert readers.MAX_FIELD_CHARACTERS == 16 * 2**20
    assert readers.MAX_PAGE_CHARACTERS == 64 * 2**20
    assert chats.MAX_MESSAGES == 2_000
