"""Task keys of published results are those that today's plans have: no result is orphaned."""

import importlib
import json
from pathlib import Path

import pytest
from molora_studies.framework.action_ids import ACTIONS, get_hashed_name, load_action
from molora_studies.framework.contract import Task
from molora_studies.framework.registry import get_studies
from molora_studies.framework.rejudge import plan_kept
from molora_studies.framework.schedule import collect_tasks

RESULTS = Path(__file__).parents[3] / "docs" / "results"


def read_published():
    documents = [json.loads(path.read_bytes()) for path in sorted(RESULTS.rglob("*.json"))]
    return [d for d in documents if isinstance(d, dict) and {"study", "cells"} <= d.keys()]


PUBLISHED = read_published()


def test_every_study_has_a_published_result():
    assert sorted(document["study"] for document in PUBLISHED) == get_studies().registry.names()


@pytest.mark.parametrize("document", PUBLISHED, ids=lambda document: document["study"])
def test_published_keys_are_those_of_the_plan(document):
    study = get_studies().registry.resolve(document["study"])
    cells = plan_kept(study, document)
    published = {cell["name"]: cell["key"] for cell in document["cells"]}
    assert {cell.name: cell.task.key for cell in cells} == published
    tasks = collect_tasks(cell.task for cell in cells).values()
    assert {f"{task.name} ({task.key[:8]})" for task in tasks} == set(document["seconds"]["tasks"])


def test_ids_and_former_paths_are_unique():
    assert len({place.hashed for place in ACTIONS.values()}) == len(ACTIONS) == 32
    assert all(callable(load_action(action)) for action in ACTIONS)


def test_a_function_that_moves_keeps_its_key_and_a_path_stands_for_itself():
    moved = ACTIONS["train-domain"]
    assert moved.hashed == "molora_fed.studies.actions:train_domain"
    module, _, name = moved.target.partition(":")
    assert load_action("train-domain") is getattr(importlib.import_module(module), name)
    assert Task("x", "train-domain", {}).key == Task("x", moved.hashed, {}).key
    assert get_hashed_name("my_package.work:train") == "my_package.work:train"
