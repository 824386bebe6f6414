"""A made-up result with every part a report can have."""

import json
from pathlib import Path

import pytest

from molora_fed.reporting.report import write_report

ROOT = Path(__file__).parents[3]


def read_result() -> dict:
    return json.loads((ROOT / "tests" / "data" / "report.json").read_text())


def make_metrics(result) -> dict:
    return {
        name: [
            {"step": step, "loss": 3.0, "validation_loss": 3.0 - step / 1000}
            for step in range(0, 100, 25)
        ]
        for name in result["own_domain"]
    }


@pytest.fixture
def result() -> dict:
    return read_result()


@pytest.fixture
def minimal(result) -> dict:
    """The same with nothing but what the schema requires."""
    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    kept = {name: result[name] for name in schema["required"]}
    losses = schema["properties"]["losses"]["required"]
    kept["losses"] = {name: result["losses"][name] for name in losses}
    return kept


@pytest.fixture
def metrics(result) -> dict:
    return make_metrics(result)


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> Path:
    """A report of all parts, written once; copy it to change it."""
    folder = tmp_path_factory.mktemp("written") / "report"
    result = read_result()
    assert write_report(result, make_metrics(result), folder) == folder / "report.html"
    return folder
