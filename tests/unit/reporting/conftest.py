"""A made-up result with every part a report can have."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def result() -> dict:
    return json.loads((ROOT / "tests" / "data" / "report.json").read_text())


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
    return {
        name: [
            {"step": step, "loss": 3.0, "validation_loss": 3.0 - step / 1000}
            for step in range(0, 100, 25)
        ]
        for name in result["own_domain"]
    }
