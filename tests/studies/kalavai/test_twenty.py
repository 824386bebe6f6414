"""The study `twenty`: its plan, what it says of a result, and keys that are the same again."""

import pytest
from matplotlib.figure import Figure as Canvas
from molora_studies.kalavai.twenty import TwentyOptions, TwentyStudy
from molora_studies.kalavai.twenty_run import _make_key, _without_times

from molora_fed.plugins import load_plugins
from molora_fed.storage.keys import load_key

DOMAINS = ("art", "law")
OPTIONS = TwentyOptions(domains=DOMAINS, newcomer="code", memory=(1, 2))


def build_stage(domains, *, seconds, wall):
    everyone = dict.fromkeys(domains, 2.0)
    gains = {"vs_best_alone": 10.0, "vs_best_specialist": 12.0}
    interval = {name: {"low": gain - 1, "high": gain + 1} for name, gain in gains.items()}
    return {
        "states": dict.fromkeys(domains, "ADMITTED"),
        "fusion": {
            "domains": list(domains),
            "own_domain": {domain: domain for domain in domains},
            "losses": {
                "base": everyone,
                "specialists": {domain: everyone for domain in domains},
                "fused": {"evidence": everyone},
            },
            "gain_percent": {"evidence": gains},
            "gain_interval_percent": {"evidence": interval},
            "forecasts": {
                "kalavai-law": {"point": 5.0, "actual": 12.0},
                "own-loss": {"point": 11.0, "actual": 12.0},
            },
        },
        "seconds": {
            "wall": wall,
            "mail": 3.0,
            "coordinator": {"seconds": seconds, "peak_bytes": 600 * 2**20},
        },
    }


def build_result(growth=1.0, private=(300, 310)):
    member = {
        "base_loss": 4.0,
        "loss": 3.0,
        "steps": 200,
        "blocks": {"calibration": 8, "held-out": 8, "admission": 4},
        "bytes": {"adapter": 1000, "samples": 200, "sent": 1300},
        "seconds": {"processor": {"corpus": 1.0, "training": 4.0}, "received_bytes": 5000},
    }
    first = {"start": 1.0, "admission": 1.0, "fusion": 18.0}
    return {
        "first": build_stage(DOMAINS, seconds=first, wall=60.0),
        "grown": build_stage(
            (*DOMAINS, "code"), seconds={**first, "fusion": 18.0 + growth}, wall=20.0
        ),
        "contributors": dict.fromkeys((*DOMAINS, "code"), member),
        "seconds": {
            "memory": {
                str(count): {"peak_bytes": 500 * 2**20, "private_bytes": size * 2**20}
                for count, size in zip((1, 2), private, strict=True)
            }
        },
    }


def summarise(seeds=(42,), **changes):
    options = OPTIONS.model_copy(update={"seeds": seeds})
    return TwentyStudy.summarise(
        options, {f"seed {seed}": build_result(**changes) for seed in seeds}
    )


def test_every_domain_is_registered():
    names = set(load_plugins().domains.names())
    assert {*TwentyOptions().domains, TwentyOptions().newcomer} <= names
    assert len(set(TwentyOptions().domains)) == 20
    assert TwentyOptions().newcomer not in TwentyOptions().domains


def test_a_seed_is_one_task_on_the_shared_base():
    cells = TwentyStudy.plan(TwentyOptions(seeds=(42, 137)))
    assert [cell.labels["seed"] for cell in cells] == [42, 137]
    assert len({cell.task.key for cell in cells}) == 2
    assert {cell.task.needs[0].key for cell in cells} == {cells[0].task.needs[0].key}


@pytest.mark.parametrize(
    ("changes", "memory", "growth"),
    [
        ({}, "holds", "holds"),
        ({"growth": 2.5}, "holds", "does not hold"),
        ({"private": (300, 331)}, "does not hold", "holds"),
    ],
)
def test_costs_decide_the_verdicts(changes, memory, growth):
    claims = {claim.claim: claim for claim in summarise((42, 137, 2026), **changes).claims}
    verdicts = [
        claim.verdict
        for start in ("The coordinator's memory", "One more contributor")
        for text, claim in claims.items()
        if text.startswith(start)
    ]
    assert verdicts == [memory, growth]


def test_one_federation_decides_nothing_over_trainings():
    claims = summarise().claims
    assert [claim.verdict for claim in claims] == ["not decided"] * 4
    assert all("federation, each a training of its own (1)" in claim.unit for claim in claims)
    assert all("not decided over trainings" in claim.reason for claim in claims)
    several = summarise((42, 137, 2026)).claims
    assert [claim.verdict for claim in several] == ["holds"] * 4


def test_figures_and_tables_are_of_the_result():
    summary = summarise()
    assert summary.findings["seed 42"]["divergence_percent"] == 25.0
    assert [row[0] for row in summary.tables[-1].rows] == [*DOMAINS, "code"]
    costs = {row[0]: row[1:] for row in summary.tables[0].rows}
    assert costs["coordinator, all"] == ("20.0", "1.0")
    assert costs["contributors, all"] == ("10.0", "5.0")
    for figure in summary.figures:
        canvas = Canvas()
        figure.draw(canvas)
        assert canvas.axes


def test_keys_are_the_same_in_every_run_and_differ_between_contributors(tmp_path):
    for name, seed in (("a", "42 art"), ("b", "42 art"), ("c", "42 law")):
        _make_key(tmp_path / name / "key.pem", seed)
    one, again, other = (
        load_key(tmp_path / name / "key.pem").private_numbers().private_value for name in "abc"
    )
    assert one == again != other


def test_times_of_forecasts_are_left_out():
    assert _without_times({"law": {"point": 1.0, "created": "now"}}) == {"law": {"point": 1.0}}
