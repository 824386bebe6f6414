import json

import pytest

from molora_fed.errors import ConfigError
from molora_fed.forecasting.matrices import load_runs, parse_runs

RUN = {
    "condition": "law and art, seed 1",
    "domains": ["law", "art"],
    "base": [4.0, 2.0],
    "specialists": [[3.0, 2.5], [4.5, 1.0]],
    "fused": [3.0, 1.0],
    "group": "law and art",
    "seed": 1,
}


def test_a_run_is_read_whole():
    [run] = parse_runs({"runs": [RUN], "note": "more"})
    assert (run.condition, run.seed, run.case.group) == ("law and art, seed 1", 1, "law and art")
    assert run.case.losses.specialists["law"] == {"law": 3.0, "art": 2.5}
    assert run.case.losses.own_domain == {"law": "law", "art": "art"}
    assert run.outcome.gains["best_specialist"] == pytest.approx(100 * (5.5 - 4.0) / 5.5)


def test_several_specialists_of_a_domain_name_it():
    rows = [[3.0, 2.5], [4.5, 1.0], [2.9, 2.4]]
    [run] = parse_runs([RUN | {"specialists": rows, "own_domain": ["law", "art", "law"]}])
    assert run.case.losses.own_domain == {"law-1": "law", "art": "art", "law-3": "law"}


def test_own_domain_only_reads_base_and_diagonal():
    strange = RUN | {"specialists": [[3.0, None], ["?", 1.0]], "fused": "secret"}
    [run] = parse_runs([strange], own_domain_only=True)
    assert run.case.losses.specialists == {"law": {"law": 3.0}, "art": {"art": 1.0}}
    assert run.fused is None and run.outcome is None


def test_group_seed_and_fused_may_be_missing():
    [run] = parse_runs([{k: RUN[k] for k in ("condition", "domains", "base", "specialists")}])
    assert (run.seed, run.case.group, run.outcome) == (None, "", None)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"domains": ["law", "law"]}, "different 'domains'"),
        ({"domains": []}, "names as 'domains'"),
        ({"domains": "law"}, "names as 'domains'"),
        ({"base": [4.0]}, "2 domains as base"),
        ({"base": [4.0, -1.0]}, "above 0 nats as base"),
        ({"base": [4.0, float("nan")]}, "finite losses"),
        ({"base": [4.0, True]}, "finite losses"),
        ({"base": None}, "as base"),
        ({"specialists": [[3.0, 2.5]]}, "each of the 1 rows"),
        ({"specialists": []}, "a row a specialist"),
        ({"specialists": [[3.0, 2.5], [4.5]]}, "row 2 of specialists"),
        ({"own_domain": ["law", "sea"]}, "one of the domains"),
        ({"fused": [3.0]}, "as fused"),
        ({"condition": 3}, "text as 'condition'"),
        ({"group": 3}, "text as 'group'"),
    ],
)
def test_a_malformed_run_is_named(change, named):
    with pytest.raises(ConfigError, match=named) as caught:
        parse_runs([RUN, RUN | change])
    assert "run 2" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("table", [{}, [], {"runs": "all"}, 3, None])
def test_a_file_without_runs_is_refused(table):
    with pytest.raises(ConfigError, match="list 'runs'"):
        parse_runs(table)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="No such file"):
        load_runs(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="expected a JSON file"):
        load_runs(tmp_path / "bad.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="expected a JSON file"):
        load_runs(tmp_path / "deep.json")
    monkeypatch.setattr("molora_fed.forecasting.matrices.MAX_BYTES", 10)
    (tmp_path / "large.json").write_text(json.dumps([RUN]))
    with pytest.raises(ConfigError, match="at most 10 bytes"):
        load_runs(tmp_path / "large.json")
