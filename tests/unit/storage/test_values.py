from pathlib import Path

import pytest

from molora_fed.errors import ConfigError
from molora_fed.storage.values import find_cache_folder, parse_data, parse_names, parse_options


def test_names_are_kept_in_order_and_once():
    assert parse_names("b, a,b") == ("b", "a")
    with pytest.raises(ConfigError, match="an empty one"):
        parse_names("a,,b")


def test_data_of_one_name_is_gathered(tmp_path):
    assert parse_data([f"law={tmp_path}", f"law={tmp_path}"]) == {"law": (tmp_path, tmp_path)}
    for wrong in ("law", "=x", "law=", f"law={tmp_path / 'nothing'}"):
        with pytest.raises(ConfigError, match="Cannot use data"):
            parse_data([wrong])


def test_options_are_toml_and_bare_words_are_text():
    given = ["precision=int4", "budget_bytes = 9_000", 'targets=["q_proj", "dense"]', "x=a=b"]
    assert parse_options(given) == {
        "precision": "int4",
        "budget_bytes": 9000,
        "targets": ["q_proj", "dense"],
        "x": "a=b",
    }
    for wrong in (["precision"], ["=int4"], ["a=1", "a=2"]):
        with pytest.raises(ConfigError, match="expected KEY=VALUE"):
            parse_options(wrong)


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("MOLORA_CACHE", raising=False)
    assert find_cache_folder() == Path("/x/molora-fed")
    monkeypatch.setenv("MOLORA_CACHE", "/y")
    assert find_cache_folder() == Path("/y")
