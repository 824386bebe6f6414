import json

import pytest

from molora_fed.cooperative.known_text import read_known_text, write_known_text
from molora_fed.errors import ConfigError


def test_folders_come_back_and_may_be_made_later(tmp_path):
    assert read_known_text(tmp_path) == {}
    corpora = {"law": tmp_path / "law" / "corpus", "art": tmp_path / "art" / "corpus"}
    write_known_text(tmp_path, corpora)
    assert read_known_text(tmp_path) == corpora


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        "\xff",
        json.dumps({"format_version": 2, "corpora": {}}),
        json.dumps({"format_version": 1, "corpora": {"law": 3}}),
        json.dumps({"format_version": 1, "corpora": {}, "more": 1}),
    ],
)
def test_a_malformed_note_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "known_text.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match="Delete the file") as caught:
        read_known_text(tmp_path)
    assert "\n" not in str(caught.value)
