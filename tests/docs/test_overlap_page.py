"""The example of docs/overlap.md runs, and its numbers are the ones in force."""

import re
from pathlib import Path

from molora_fed.privacy.messages import BATCH, MAX_QUERY_BATCHES, MAX_SET_BATCHES, SET_BATCH
from molora_fed.privacy.oprf import ELEMENT_BYTES

PAGE = (Path(__file__).parents[2] / "docs" / "overlap.md").read_text(encoding="utf-8")


def test_the_example_runs(capsys):
    [example] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(compile(example, "overlap.md", "exec"), {})
    assert capsys.readouterr().out == "[5 8]\n"


def test_bounds_are_the_ones_in_force():
    assert (
        f"{ELEMENT_BYTES} bytes each, batches of {BATCH:,}, at most {MAX_QUERY_BATCHES} |" in PAGE
    )
    assert f"8 bytes each, batches of {SET_BATCH:,}, at most {MAX_SET_BATCHES} |" in PAGE


def test_what_can_be_tested_follows_from_the_bounds():
    guesses = MAX_QUERY_BATCHES * BATCH
    assert f"| guesses of one member, the same about each other member | {guesses:,} |" in PAGE
    assert f"| answers it gets in a fusion of 20 members | {19 * guesses:,} |" in PAGE
    assert f"if all 19 others work together | {19 * guesses:,} |" in PAGE
    assert f"leaves {guesses - 20_000:,} guesses" in PAGE


def test_the_probability_of_a_chance_tag_is_at_most_the_stated_one():
    assert "with probability 3e-8" in PAGE
    assert MAX_QUERY_BATCHES * BATCH * MAX_SET_BATCHES * SET_BATCH / 2**64 < 3.05e-8
