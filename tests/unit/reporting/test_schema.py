import copy
import json
from pathlib import Path

import jsonschema
import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def validator():
    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_a_full_and_a_minimal_result_are_valid(validator, result, minimal):
    validator.validate(result)
    validator.validate(minimal)


@pytest.mark.parametrize(
    "path",
    [
        ("losses", "base"),
        ("losses", "token_oracle"),
        ("gain_percent", "evidence", "vs_best_alone"),
        ("gain_percent", "evidence", "vs_best_specialist"),
        ("oracle_gap_nats", "evidence", "high"),
        ("forecasts", "kalavai-law", "actual"),
        ("contamination",),
        ("seconds",),
    ],
)
def test_what_the_issue_names_is_required(validator, result, path):
    broken = copy.deepcopy(result)
    inner = broken
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    assert not validator.is_valid(broken)


def test_values_of_the_wrong_kind_are_refused(validator, result):
    for path, value in (
        (("seed",), "42"),
        (("contamination", "python"), 1.2),
        (("losses", "base", "python"), "high"),
        (("forecasts", "own-loss", "reference"), "nobody"),
    ):
        broken = copy.deepcopy(result)
        inner = broken
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        assert not validator.is_valid(broken), path
