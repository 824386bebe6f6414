"""How a runner and its workers talk: one JSON value a line, over the worker's own two pipes."""

import json
from collections.abc import Mapping
from typing import Any

from molora_studies.framework.contract import Task
from molora_studies.framework.schedule import collect_tasks

__all__ = ["decode_task", "encode_line", "encode_task"]


def encode_line(value: Mapping[str, Any]) -> bytes:
    """One message; figures that JSON cannot carry become null, other things text."""
    return (json.dumps(_make_finite(value), ensure_ascii=False, default=str) + "\n").encode()


def _make_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _make_finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_make_finite(each) for each in value]
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return None
    return value


def encode_task(task: Task) -> list[dict[str, Any]]:
    """A task and all it rests on as JSON values, itself last."""
    tasks = collect_tasks([task])
    places = {key: index for index, key in enumerate(tasks)}
    return [
        {
            "name": each.name,
            "action": each.action,
            "settings": dict(each.settings),
            "needs": [places[need.key] for need in each.needs],
            "seconds": each.seconds,
            "version": each.version,
        }
        for each in tasks.values()
    ]


def decode_task(rows: list[dict[str, Any]]) -> Task:
    """The task that `encode_task` encoded; its key is the same."""
    tasks: list[Task] = []
    for row in rows:
        tasks.append(Task(**{**row, "needs": tuple(tasks[index] for index in row["needs"])}))
    return tasks[-1]
