"""The headline forecast comes first, set apart; results of earlier versions are shown as before."""

import io

import pytest
from rich.console import Console

from molora_fed.reporting.headline import (
    describe_claim,
    list_headline,
    list_notes,
    order_forecasts,
)
from molora_fed.reporting.report import render_html
from molora_fed.reporting.summary import build_run_forecast, build_summary

ROW = {
    "reference": "best_specialist", "point": 9.44, "low": 7.9, "high": 10.9, "level": 0.8,
    "actual": 9.16, "router": "evidence", "note": "80 % if alike.",
}  # fmt: skip


@pytest.fixture
def headed(result):
    """The usual result with a headline forecast that sorts last by name."""
    result["forecasts"]["zz-headline"] = dict(ROW)
    result["headline"] = {"predictors": ["zz-headline"], "reason": None}
    return result


def render(part) -> str:
    console = Console(width=200, file=io.StringIO(), highlight=False)
    console.print(part)
    return console.file.getvalue()


CLAIM = "+9.44 % on the best specialist, 80 % interval +7.90 to +10.90"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, f"{CLAIM}; came out +9.16 %: inside"),
        ({"actual": 7.0}, f"{CLAIM}; came out +7.00 %: outside"),
        ({"actual": None}, CLAIM),
        (
            {"low": None, "high": None, "level": None},
            "+9.44 % on the best specialist, no interval claimed; came out +9.16 %",
        ),
        ({"point": None, "actual": None}, CLAIM.replace("+9.44 %", "no single value")),
    ],
)
def test_a_claim_is_one_line(change, text):
    assert describe_claim(ROW | change) == text


def test_the_headline_follows_the_gain_and_is_on_top_of_the_table(headed):
    text = render(build_summary(headed))
    claim = text.index("Forecast: +9.44 % on the best specialist")
    assert text.index("gain over the best") < claim < text.index("Held-out loss")
    assert "zz-headline: 80 % if alike." in text
    table = text[text.index("Forecast gain against outcome") :]
    assert table.index("zz-headline") < table.index("kalavai-law") < table.index("own-loss")
    # What the others rest on stands below the table.
    for row in headed["forecasts"].values():
        assert row.get("note", "").split(";")[0] in " ".join(text.split())


def test_the_page_has_it_before_all_tables(headed):
    page = render_html(headed, {})
    assert page.index("Forecast: +9.44 % on the best specialist") < page.index("<table>")
    rows = page[page.index("Forecasts, made before") :]
    assert rows.index("zz-headline") < rows.index("kalavai-law")


def test_a_headline_that_cannot_be_given_says_why(result):
    result["headline"] = {"predictors": [], "reason": "losses are needed; fuse"}
    said = "No headline forecast: losses are needed; fuse."
    assert said in render(build_summary(result))
    assert said in render_html(result, {})


def test_a_result_of_an_earlier_version_has_no_headline(result):
    assert "headline" not in result
    assert list_headline(result) == []
    first, rest = order_forecasts(result)
    assert first == [] and [name for name, _ in rest] == sorted(result["forecasts"])
    text = render(build_summary(result))
    assert "Forecast:" not in text and "No headline" not in text


def test_claims_keep_their_own_reference_where_forecasts_are_restated():
    claims = {"a": ROW | {"reference": "best_alone", "actual": None}}
    run = {
        "condition": "c",
        "forecasts": {"a": ROW | {"point": 12.0, "floor": 0.0, "verdict": "go"}},
        "headline": {"predictors": ["a"], "reason": None, "claims": claims},
    }
    text = render(build_run_forecast(run))
    assert text.startswith("Forecast: +9.44 % on the best alone")
    assert "+12.00" in text


def test_predictors_of_one_basis_share_a_line():
    rows = [("a", ROW), ("b", ROW), ("c", ROW | {"note": ""}), ("d", ROW | {"note": "Other."})]
    assert list_notes(rows) == ["a, b: 80 % if alike.", "d: Other."]
