"""Reference pages are as the code is, and nothing that a user meets is without description."""

import importlib.util
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

DOCS = Path(__file__).parents[2] / "docs"
SPEC = importlib.util.spec_from_file_location("build_reference", DOCS / "build_reference.py")
assert SPEC is not None and SPEC.loader is not None
reference = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(reference)


@pytest.mark.parametrize("name", sorted(reference.PAGES))
def test_a_reference_page_is_as_the_code_is(name):
    kept = (DOCS / "reference" / name).read_text(encoding="utf-8")
    assert kept == reference.PAGES[name](), "run `python docs/build_reference.py`"


def test_a_command_without_help_and_an_option_without_help_are_named():
    silent = click.Command("mute", params=[click.Option(["--loud"])], help="Says nothing.")
    context = click.Context(silent)
    with pytest.raises(reference.MissingDescriptionError, match="option '--loud' of 'mute'"):
        list(reference._describe_command(silent, "molora mute", context))
    with pytest.raises(reference.MissingDescriptionError, match="command 'molora x'"):
        list(reference._describe_command(click.Command("x"), "molora x", context))


def test_a_key_without_description_is_named():
    class Rules(BaseModel):
        """Rules.

        Attributes:
            known: A key that
                goes on in a second line.
        """

        known: int = 1
        unknown: int = 2

    assert reference._read_attributes(Rules) == {"known": "A key that goes on in a second line."}
    with pytest.raises(reference.MissingDescriptionError, match=r"key 'rules\.unknown'"):
        list(reference._describe_model(Rules, "rules"))


def test_a_hook_without_a_page_is_named():
    with pytest.raises(reference.MissingDescriptionError, match="register_nothing"):
        reference._find_page("register_nothing")
