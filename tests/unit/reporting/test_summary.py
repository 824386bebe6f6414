import io

from rich.console import Console

from molora_fed.contributions.build import OutgoingRow
from molora_fed.reporting.methods import BUDGET_SECONDS
from molora_fed.reporting.summary import (
    build_outgoing_table,
    build_sample_text,
    build_summary,
    build_time_table,
)


def render(*parts) -> str:
    console = Console(width=200, file=io.StringIO(), highlight=False)
    console.print(*parts, sep="\n")
    return console.file.getvalue()


def test_the_summary_has_every_method_forecast_and_domain(result):
    text = render(build_summary(result))
    for word in ("fused, evidence-zero", "token oracle", "kalavai-law", "1.21 %"):
        assert word in text
    assert text.index("gain over the best anyone has alone") < text.index("token oracle")
    assert "base 1,500 steps, 3,072,000 tokens" in text
    assert "pooled text, linear layers 1,050 steps" in text
    assert (
        "linear layers trained on everybody's text pooled, for as many steps in all: +13.71 %"
        in text
    )


def test_both_controls_say_what_they_trained_and_who_is_better(result):
    losses = result["losses"]
    losses["monolithic"] = losses.pop("control")
    losses["base_continued"] = {domain: 1.0 for domain in losses["base"]}
    result["control_difference_nats"] = {
        "monolithic": {"point": -0.03, "low": -0.04, "high": -0.02},
        "base_continued": {"point": 0.13, "low": 0.12, "high": 0.15},
    }
    result["compute"]["controls"] = {
        "monolithic": {"steps": 70, "tokens": 8},
        "base_continued": {"steps": 80, "tokens": 9},
    }
    text = render(build_summary(result))
    assert "(-0.0400 to -0.0200): fusing is better." in text
    assert "the base continued with all its parameters on everybody's text pooled" in text
    assert "+0.1300 nats (+0.1200 to +0.1500): pooling is better." in text
    assert "pooled text, all parameters 80 steps" in text
    result["control_difference_nats"]["base_continued"]["low"] = -0.1
    assert "neither is better" in render(build_summary(result))


def test_the_largest_excess_stands_beside_what_is_promised(result):
    result["excess_nats"] = {result["router"]: {"largest": 1.5, "parts": 1700, "bound": 2.3026}}
    text = render(build_summary(result))
    assert "more than 1.500 nats above its best expert (1,700 parts" in text
    assert "at most 2.303 are promised" in text
    result["excess_nats"][result["router"]]["bound"] = None
    assert "nothing is promised" in render(build_summary(result))


def test_the_summary_of_a_minimal_result(minimal):
    assert "specialist python-1" in render(build_summary(minimal))


def test_forecasts_that_claim_nothing(result):
    for forecast in result["forecasts"].values():
        forecast.update(point=None, low=None, high=None, level=None, actual=None)
    assert render(build_summary(result)).count("none claimed") == 3


def test_times_against_their_budget():
    text = render(
        build_time_table({"training": 130.0, "base": 1.0, "base_continued": 5.0}, BUDGET_SECONDS)
    )
    lines = [line for line in text.splitlines() if "│" in line]
    assert [line.split()[1] for line in lines] == ["base", "base_continued", "training", "in"]
    assert "136.0" in lines[-1] and "480" in lines[-1]


def test_what_leaves_the_machine_is_counted_and_summed():
    rows = [
        OutgoingRow("calibration sample", 150, 19_200, 234_496, exact=True),
        OutgoingRow("adapter", 0, 0, 1_000_000, exact=True),
    ]
    text = render(build_outgoing_table(rows))
    assert "19,200" in text and "1,234,496" in text and "at most" not in text
    rows[0] = OutgoingRow("calibration sample", 150, 19_200, 234_496, exact=False)
    assert "at most" in render(build_outgoing_table(rows))


def test_samples_say_which_expert_spoke_and_steer_no_terminal():
    sample = {
        "domain": "python", "prompt": "def [bold]f", "text": "(x):\x1b[31m", "experts": {"a": 0.9},
    }  # fmt: skip
    text = render(build_sample_text(sample))
    assert "mostly a, mean gate 0.90" in text and "[bold]" in text and "\x1b" not in text


def test_a_replaced_router_is_said_in_the_first_line_of_terminal_and_page(result):
    from molora_fed.reporting.report import render_html

    attempt = {"excess_nats": {"cpp": 0.054, "python": 0.051, "science": -0.1}}
    result["guard"] = {
        "centroid": {
            "kept": 0,
            "collapsed": ["cpp", "python"],
            "attempts": [attempt],
            "replaced_by": "evidence-zero",
        }
    }
    line = (
        "Router 'centroid' lost cpp, python (0.054 nats above their best expert): 'evidence-zero' "
        "published instead."
    )
    assert render(build_summary(result)).splitlines()[0].strip() == line
    page = render_html(result, {}).replace("&#39;", "'")
    assert page.index(line) < page.index("gain over the best anyone has alone</strong>")


def test_what_failed_and_who_was_used_is_said(result):
    from molora_fed.reporting.report import render_html

    why = "failed: Router 'b' of broken (molora-broken 0.1.0) failed in fit: IndexError."
    result["not_measured"] = {"router": {"b": why}, "gain predictor": {"silent": "Not given."}}
    result["plugins"] = {"router": [{"name": "mine", "plugin": "molora-mine", "version": "2.5"}]}
    text = " ".join(render(build_summary(result)).split())
    page = render_html(result, {}).replace("&#39;", "'")
    for shown in (text, page):
        assert f"router b {why}" in shown and "silent" in shown and "silent Not given" not in shown
    assert "router mine (molora-mine 2.5)" in page
