"""docs/results/claims.md says of every claim what the kept results say, and hands may write it."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "results" / "claims.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def claims():
    """The module bench/claims.py."""
    spec = importlib.util.spec_from_file_location("bench_claims", ROOT / "bench" / "claims.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kept_verdict_is_on_the_page_as_it_is(claims):
    generated = PAGE.partition(claims.START)[2]
    rows = {}
    for section in generated.split("\n### ")[1:]:
        study = section[1 : section.index("]")]
        rows[study] = [line.split(" | ") for line in section.splitlines() if "|" in line][2:]
    results = {d["study"]: d for d in claims.read_results(ROOT).values()}
    assert rows.keys() == results.keys()
    for study, found in rows.items():
        kept = results[study]["summary"]["claims"]
        shown = [(row[2].strip("*"), row[3]) for row in found if row[2].strip("*") != "-"]
        assert shown == [(claim["verdict"], claim["unit"]) for claim in kept], study


def make(text, verdict):
    return {"claim": text, "verdict": verdict, "unit": "seed (3)", "measured": "1", "reason": "so"}


def test_claims_are_paired_by_their_sentence_then_by_the_nearest(claims):
    before = [make("It rains in the north", "holds"), make("Sums grow", "holds")]
    after = [make("Sums grow", "not decided"), make("It rains in the far north", "holds")]
    pairs = claims.pair_claims(before, after)
    assert [(one["verdict"], two["verdict"]) for one, two in pairs] == [
        ("holds", "not decided"),
        ("holds", "holds"),
    ]
    rows = [claims.describe_pair(pair) for pair in pairs]
    assert rows[0] == ["Sums grow", "holds", "**not decided**", "seed (3)", "1: so"]
    assert rows[1][0] == 'It rains in the far north (before: "It rains in the north")'
    assert rows[1][4] == ""
    gone = claims.pair_claims([make("Sums grow", "holds")], [])
    assert claims.describe_pair(gone[0])[1:3] == ["holds", "**-**"]


def test_what_hands_wrote_stays(claims, tmp_path, monkeypatch):
    out = tmp_path / "claims.md"
    out.write_text(f"# By hand\n\nKept.\n\n{claims.START}\n\nold\n")
    argv = ["claims.py", "--before", "HEAD", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    claims.main()
    text = out.read_text(encoding="utf-8")
    assert text.startswith(f"# By hand\n\nKept.\n\n{claims.START}\n\n## Verdicts")
    assert "\nold\n" not in text
    monkeypatch.setattr(sys, "argv", [*argv[:2], "no-such-commit", *argv[3:]])
    with pytest.raises(SystemExit, match="expected a commit of this repository"):
        claims.main()
