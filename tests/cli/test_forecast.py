"""`molora forecast` on loss matrices, cooperatives and pilots; its history."""

import json
import shutil

import pytest
from molora_cli import main
from molora_kalavai.published import load_published_runs

from molora_fed.cooperative.cooperative import open_cooperative


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
        assert set(run) == {"condition", "headline", "forecasts"}
        names = ["measured-alone", "measured-specialist"]
        assert run["headline"]["predictors"] == names == list(run["headline"]["claims"])
        assert run["headline"]["claims"]["measured-alone"]["reference"] == "best_alone"
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
    headline = json.loads(seen.out)["runs"][0]["headline"]
    assert headline["predictors"] == [] and "on every domain are needed" in headline["reason"]
    assert forecasts["fitted"]["low"] < forecasts["fitted"]["point"]


def test_without_its_groups_name_a_run_is_still_never_its_own_evidence(molora, matrices):
    named = molora("forecast", "--matrix", matrices(), "--json")
    nameless = matrices(lambda run: {k: v for k, v in run.items() if k != "group"}, "nameless.json")
    assert molora("forecast", "--matrix", nameless, "--json").out == named.out


def test_tables_for_people(molora, matrices):
    ran = molora("forecast", "--matrix", matrices())
    assert ran.code == 0
    assert ran.out.startswith("Forecast: ")
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


@pytest.fixture(scope="module")
def told(setup, tmp_path_factory):
    """A cooperative forecast from pilots and from contributions, then fused, with its folder."""
    root = tmp_path_factory.mktemp("told")
    shutil.copytree(setup.cooperative, root / "tiny")
    pilots = []
    for domain, texts in setup.texts.items():
        pilots += ["--pilot", root / f"pilot-{domain}"]
        run_quietly(
            "train", "--cooperative", root / "tiny", "--domain", domain, "--data", texts,
            "--out", pilots[-1], "--steps", 1, "--threads", 1, "--name", f"{domain}-1",
        )  # fmt: skip
    contributions = [part for d in setup.trained for part in ("--contribution", setup.trained[d])]
    run_quietly("forecast", "--cooperative", root / "tiny", *pilots)
    run_quietly("forecast", "--cooperative", root / "tiny", *contributions)
    fused = ("fuse", "--cooperative", root / "tiny", "--out", root / "out")
    run_quietly(*fused, *setup.trained.values())
    return root


def run_quietly(*arguments):
    assert main.run([str(argument) for argument in arguments]) == 0


def test_forecasts_of_every_stage_are_recorded_first_and_scored_by_the_fusion(molora, told):
    with open_cooperative(told / "tiny").read_ledger() as ledger:
        records = ledger.records("forecast")
    stages = [record.data["stage"] for record in records]
    assert sorted(set(stages), key=stages.index) == ["pilots", "contributions", "calibration"]
    actual = {
        reference: {r.outcome["actual"] for r in records
                    if r.data["forecast"]["reference"] == reference}
        for reference in ("best_alone", "best_specialist")
    }  # fmt: skip
    assert [len(values) for values in actual.values()] == [1, 1]
    assert all(r.created < r.scored for r in records)


def test_a_pilots_forecast_claims_no_interval_without_records_of_pilots(told):
    with open_cooperative(told / "tiny").read_ledger() as ledger:
        claims = [r.data for r in ledger.records("forecast") if r.data["stage"] == "pilots"]
    assert {"fitted", "forgetting", "own-loss", "kalavai-law"} <= {c["predictor"] for c in claims}
    # The headline rests on pilots of our own; all others on the caller's, of which there are none.
    measured = [c for c in claims if c["predictor"].startswith("measured-")]
    assert len(measured) == 2 and all(c["forecast"]["level"] == 0.8 for c in measured)
    for claim in claims:
        if claim in measured:
            continue
        assert claim["forecast"]["point"] is not None
        assert claim["forecast"]["low"] is None and claim["forecast"]["level"] is None
        assert set(claim["pilots"]["specialists"]["abc-1"]) == {"abc", "xyz"}
        assert set(claim["losses"]["specialists"]["abc-1"]) == {"abc"}
        assert claim["share"] == pytest.approx(1 / 12)


def test_history_counts_scores_and_draws(molora, told, tmp_path):
    ran = molora("forecast", "history", told, "--figure", tmp_path / "h.png", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["waiting"] == 0
    rows = {(row["predictor"], row["stage"]): row for row in found["predictors"]}
    # The ledger and the fusion's forecasts.json tell of the same forecasts.
    assert {row["count"] for row in rows.values()} == {1}
    assert rows["fitted", "contributions"]["runs"]["count"] == 1
    assert rows["fitted", "pilots"]["runs"] is None
    assert rows["fitted", "pilots"]["mae"] >= 0
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
    ran = molora("forecast", "history", told / "tiny")
    assert "fitted" in ran.out and "contributions" in ran.out


def test_past_forecasts_are_evidence_for_others_and_never_for_their_own_group(
    molora, matrices, told, setup
):
    plain = molora("forecast", "--matrix", matrices(), "--json")
    ran = molora("forecast", "--matrix", matrices(), "--past", told, "--json")
    assert ran.code == 0, ran.err
    note = json.loads(ran.out)["runs"][0]["forecasts"]["fitted"]["note"]
    assert "6 published and 1 own groups" in note
    assert ran.out != plain.out


def test_pilots_with_too_many_steps_are_refused(molora, setup):
    ran = molora(
        "forecast", "--cooperative", setup.cooperative, "--pilot", setup.trained["abc"],
        "--pilot", setup.trained["xyz"],
    )  # fmt: skip
    assert ran.code == 10
    assert "at most 1 of the planned 12" in ran.err


def test_history_of_nothing_is_refused(molora, tmp_path):
    ran = molora("forecast", "history", tmp_path)
    assert ran.code == 10
    assert "no recorded forecast" in ran.err
    (tmp_path / "forecasts.json").write_text("{}")
    ran = molora("forecast", "history", tmp_path)
    assert ran.code == 10 and ran.err.count("\n") == 1
