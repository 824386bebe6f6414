"""Tasks run one after the other in this process; equal tasks once for all tests."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from molora_studies.framework.action_ids import load_action
from molora_studies.framework.contract import Done, Task, TaskContext


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Task], Done]:
    root: Path = tmp_path_factory.mktemp("tasks")
    finished: dict[str, Done] = {}

    def run_task(task: Task) -> Done:
        if task.key not in finished:
            needs = tuple(run_task(other) for other in task.needs)
            folder = root / task.key
            folder.mkdir()
            context = TaskContext(folder, needs, 1, root / "cache")
            settings = json.loads(json.dumps(task.settings))
            result = json.loads(json.dumps(load_action(task.action)(settings, context)))
            finished[task.key] = Done(task, folder, result)
        return finished[task.key]

    return run_task
