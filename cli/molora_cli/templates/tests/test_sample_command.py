"""The contract of commands, and what makes this command this command."""

import pytest
from molora_fed.errors import CharterError
from molora_fed.testing import check_command_conformance

from molora_sample_command.command import run

CHARTER = """
[identity]
name = "try"

[identity.base]
id = "tiny"
weights = "{hash}"
tokenizer = "{hash}"

[amendment]
domains = ["prose", "code"]
"""


def test_keeps_the_contract():
    check_command_conformance("molora_sample_command.command:run")


def test_shows_the_domains_of_a_cooperative(tmp_path, capsys):
    (tmp_path / "cooperative.toml").write_text(CHARTER.format(hash="0" * 64))
    run(tmp_path, upper=True)
    assert capsys.readouterr().out.split() == ["PROSE", "CODE"]


def test_says_what_is_missing(tmp_path):
    with pytest.raises(CharterError, match=r"cooperative\.toml"):
        run(tmp_path)
