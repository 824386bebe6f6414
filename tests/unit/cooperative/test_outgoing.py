"""The one list of what leaves a contributor, and what can be told from it."""

import pytest
from carried_helpers import NAME, MeanStateRouter, load_with_plugin

from molora_fed.charter import (
    Amendment,
    BaseIdentity,
    Charter,
    FusionRules,
    Identity,
    PopulationRules,
    choose_privacy,
)
from molora_fed.cooperative.outgoing import WIDEST, describe_outgoing
from molora_fed.errors import ConfigError, UnknownNameError
from molora_fed.plugins import load_plugins
from molora_fed.privacy.sums.messages import measure_phases

PLUGINS = load_plugins()
BASE = BaseIdentity(
    id="tiny",
    weights="0" * 64,
    tokenizer="1" * 64,
    config="2" * 64,
    files={"config.json": "3" * 64},
)
DOMAINS = ("legal", "man", "python", "web")


def build_charter(mode="private", summing="masked", fusion=None, **amendment):
    identity = Identity(version=2, name="test", base=BASE, privacy_mode=mode, summing=summing)
    rules = FusionRules(**(fusion or {}))
    return Charter(identity=identity, amendment=Amendment(fusion=rules, **amendment))


def describe(charter, width=128):
    return describe_outgoing(charter, PLUGINS, width=width)


def list_sums(charter, width=128):
    return [row for row in describe(charter, width).rows if "sums" in row.what and row.numbers]


def test_carried_files_are_listed_by_the_most_that_the_charter_takes():
    plugins = load_with_plugin()
    for mode in ("pooled", "private", "statistics"):
        fusion = {"router": MeanStateRouter.name, "carried": (NAME,), "max_carried_bytes": 5_000}
        charter = build_charter(mode, fusion=fusion)
        found = describe_outgoing(charter, plugins, width=128)
        (row,) = [row for row in found.rows if "carried" in row.what]
        assert (row.bytes, row.exact, row.blocks, row.times) == (5_000, False, 0, 1)
        assert [text.startswith("Carried files are computed here") for text in found.told][-1]
        plain = describe_outgoing(build_charter(mode), plugins, width=128)
        assert not any("arried" in text for text in (*plain.told, *(r.what for r in plain.rows)))


def test_a_private_fusion_sends_no_text_and_lists_every_sum():
    charter = build_charter(
        domains=DOMAINS, fusion={"router": "evidence", "compare": ("linear",), "restarts": 2}
    )
    rows = describe(charter).rows
    assert not any(row.blocks or row.tokens for row in rows)
    sums = list_sums(charter)
    assert [row.what for row in rows[:2]] == ["adapter, by the charter's limit", "manifest"]
    # Five experts, three weights and four directions of the prior: seven numbers are fitted at ten
    # points, with the halves of two curvatures; and 128 weights and a bias for each expert.
    evidence, linear = 10 * (1 + 7 + 2 * 28), 1 + 5 * 128
    columns = count_columns(specialists=4, routers=3, baselines=1)
    assert [(row.what.removeprefix("masked sums, "), row.numbers, row.times) for row in sums] == [
        ("fit of the routers, round 1 (and calibration losses)", evidence + linear + 4 * 18, 1),
        ("fit of the routers, rounds 2 to 5", evidence + linear, 4),
        ("fit of the routers, rounds 6 to 12", linear, 7),
        ("losses of the fitted routers, calibration text", 3 * 4 * 6, 1),
        ("only if a router loses a domain, fitted again", linear, 24),
        ("only if a router loses a domain, losses after it", 4 * 6, 2),
        ("losses and gates, held-out text", 4 * (3 + 3 * columns) + 4 * 3 * 5, 1),
    ]


def test_a_shortlists_numbers_and_what_they_tell_are_listed():
    plain = build_charter(domains=DOMAINS, fusion={"router": "evidence", "compare": ()})
    short = build_charter(
        domains=DOMAINS, fusion={"router": "evidence", "compare": (), "shortlist": 3}
    )
    rows = [list_sums(charter)[-1] for charter in (plain, short)]
    cost = 4 * (3 + 3 * 2)  # domains; clusters, tokens and squares; router and fallback
    assert rows[1].what.endswith(f"(and {cost} numbers: what your shortlist loses)")
    assert rows[1].numbers == rows[0].numbers + cost and rows[1].times == rows[0].times
    told = [line for line in describe(short).told if "3 experts on all of your text" in line]
    assert len(told) == 1 and "which they are" in told[0]
    assert not any("experts on all of your text" in line for line in describe(plain).told)


def count_columns(*, specialists, routers, baselines):
    """As docs/private_fusion.md has it."""
    others = routers + baselines + 2
    return (specialists + 1) * (others + 1) + others + baselines * routers + specialists


def test_masked_sums_cost_keys_and_shares_and_robust_ones_are_seen():
    masked, robust = (describe(build_charter(summing=way)) for way in ("masked", "robust"))
    keys = [row for row in masked.rows if row.what.startswith("keys")]
    assert keys[0].bytes > sum(measure_phases(3).values())
    assert keys[0].times == sum(row.times for row in masked.rows if row.what.startswith("masked"))
    assert not any(row.what.startswith("keys") for row in robust.rows)
    assert any("Your sums are masked" in line for line in masked.told)
    assert any("fewer than 3 share it" in line for line in masked.told)
    assert any("The coordinator sees your sums" in line for line in robust.told)
    for told in (masked.told, robust.told):
        assert any("once a fusion" in line and "64 fusions" in line for line in told)
        assert any("adapter goes to the coordinator, and" in line for line in told)


def test_sizes_are_stated_for_the_base_or_for_the_widest():
    charter = build_charter(domains=DOMAINS)
    known, unknown = describe(charter), describe(charter, None)
    assert f"{WIDEST:,}" in " ".join(unknown.told)
    assert f"{WIDEST:,}" not in " ".join(known.told)
    assert sum(row.numbers for row in unknown.rows) > sum(row.numbers for row in known.rows)


def test_other_modes_say_what_they_send():
    pooled = describe(build_charter("pooled"))
    assert pooled.rows[0].what == "calibration sample" and "can read" in pooled.told[0]
    evolving = build_charter(
        "pooled", fusion={"mode": "population"}, population=PopulationRules(data="private")
    )
    assert "adapted population, every round" in [row.what for row in describe(evolving).rows]
    assert evolving.privacy.startswith("private: no text leaves; adapted populations")
    assert build_charter("pooled").privacy.startswith("pooled")
    assert "totals of sums over three" in build_charter().privacy


@pytest.mark.parametrize("summing", ["masked", "robust"])
def test_published_statistics_are_listed_with_the_sums_that_measure(summing):
    fusion = {"router": "statistics", "compare": ("evidence-zero",)}
    charter = build_charter("statistics", summing, domains=DOMAINS, fusion=fusion)
    found = describe(charter)
    (published,) = [row for row in found.rows if row.what.startswith("statistics of the base's")]
    assert (published.numbers, published.exact, published.times) == (1 + 128 + 128 * 129 // 2, 0, 1)
    assert 4 * (128**2 + 128) < published.bytes < 4 * (128**2 + 128) + 5_000
    assert not any(row.blocks or row.tokens for row in found.rows)
    columns = count_columns(specialists=4, routers=2, baselines=1)
    names = [row.what.partition("sums, ")[2] for row in list_sums(charter)]
    assert names == [
        "losses of base and adapters, calibration text", "losses and gates, held-out text",
    ]  # fmt: skip
    assert [row.numbers for row in list_sums(charter)] == [
        4 * 18, 4 * (3 + 3 * columns) + 4 * 2 * 5,
    ]  # fmt: skip
    assert "covariance of the states of all your calibration tokens" in found.told[0]
    assert "No noise is added, and who has them keeps them" in found.told[1]
    assert not any("for some routers of hidden states" in line for line in found.told)
    wide = describe(charter, None).rows
    assert max(row.bytes for row in wide if row.what.startswith("statistics")) > 2**30


def test_a_router_that_nobody_registers_here_is_named():
    with pytest.raises(UnknownNameError, match="'evidenec'"):
        describe(build_charter(fusion={"router": "evidenec"}))


@pytest.mark.parametrize(
    ("mode", "summing", "expected"),
    [(None, None, ("private", "masked")), ("pooled", None, ("pooled", "masked")),
     (None, "robust", ("private", "robust"))],
)  # fmt: skip
def test_privacy_is_chosen(mode, summing, expected):
    rules = choose_privacy("c", mode, summing)
    assert (rules.mode, rules.summing) == expected


@pytest.mark.parametrize(
    ("mode", "summing", "words"),
    [("secret", None, "--privacy pooled or private"), ("private", "plain", "masked or robust"),
     ("pooled", "robust", "--summing with --privacy private")],
)  # fmt: skip
def test_a_wrong_choice_is_one_line(mode, summing, words):
    with pytest.raises(ConfigError) as error:
        choose_privacy("c", mode, summing)
    assert words in str(error.value) and "\n" not in str(error.value)
