"""`molora forecast` on loss matrices, cooperatives and pilots; its history."""

import json

import pytest
from molora_kalavai.published import load_published_runs

PUBLISHED = ("condition", "domains", "base", "specialists", "fused", "group")


@pytest.fixture
def matrices(tmp_path):
    """The published runs of two groups as a file, and how to write another."""

    def write(change=lambda run: run, name="matrices.json"):
        runs = []
        for run in load_published_runs()[:6]:
            losses = run.case.losses
            runs.append(
                {
                    "condition": run.condition,
                    "domains": list(losses.domains),
                    "base": [losses.base[d] for d in losses.domains],
                    "specialists": [
                        [losses.specialists[s][d] for d in losses.domains] for s in losses.domains
                    ],
                    "fused": [run.fused[d] for d in losses.domains],
                    "group": run.case.group,
                }
            )
        path = tmp_path / name
        path.write_text(json.dumps({"runs": [change(run) for run in runs]}))
        return path

    return write


def test_json_has_every_run_and_predictor(molora, matrices):
    ran = molora("forecast", "--matrix", matrices(), "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert set(found) == {"runs"}
    assert [run["condition"] for run in found["runs"]] == [
        run.condition for run in load_published_runs()[:6]
    ]
    for run in found["runs"]:
        assert set(run) == {"condition", "forecasts"}
        for forecast in run["forecasts"].values():
            assert {"point", "low", "high", "level"} <= set(forecast)


def test_own_domain_only_changes_with_nothing_but_base_and_diagonal(molora, matrices):
    def hide(run):
        size = len(run["domains"])
        rows = [[row[i] if i == j else None for j in range(size)]
                for i, row in enumerate(run["specialists"])]  # fmt: skip
        return run | {"specialists": rows, "fused": None}

    seen = molora("forecast", "--matrix", matrices(), "--own-domain-only", "--json")
    hidden = molora("forecast", "--matrix", matrices(hide, "hidden.json"), "--own-domain-only",
                    "--json")  # fmt: skip
    assert (seen.code, hidden.code) == (0, 0)
    assert seen.out == hidden.out
    forecasts = json.loads(seen.out)["runs"][0]["forecasts"]
    assert forecasts["loss-matrix"]["point"] is None
    assert forecasts["fitted"]["low"] < forecasts["fitted"]["point"]


def test_without_its_groups_name_a_run_is_still_never_its_own_evidence(molora, matrices):
    named = molora("forecast", "--matrix", matrices(), "--json")
    nameless = matrices(lambda run: {k: v for k, v in run.items() if k != "group"}, "nameless.json")
    assert molora("forecast", "--matrix", nameless, "--json").out == named.out


def test_tables_for_people(molora, matrices):
    ran = molora("forecast", "--matrix", matrices())
    assert ran.code == 0
    assert "phase2-cross_lingual-result_seed137" in ran.out
    assert "80 %" in ran.out and "go" in ran.out


def test_bad_input_is_one_line(molora, tmp_path, matrices):
    for arguments, said in (
        ((), "Cannot forecast"),
        (("--matrix", tmp_path / "none.json"), "No such file"),
        (("--matrix", matrices(lambda run: run | {"base": [1.0]}, "bad.json")), "as base"),
    ):
        ran = molora("forecast", *arguments)
        assert ran.code == 10
        assert said in ran.err and ran.err.count("\n") == 1
