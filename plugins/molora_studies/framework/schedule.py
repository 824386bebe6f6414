"""Which task comes when, and how long all of them take: plain functions over the graph of tasks."""

import heapq
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from molora_studies.framework.contract import Task

__all__ = ["collect_tasks", "estimate_seconds", "find_missing", "measure_paths"]


def collect_tasks(tasks: Iterable[Task]) -> dict[str, Task]:
    """All tasks these rest on and themselves by key, each once, needs before what needs them."""
    found: dict[str, Task] = {}

    def visit(task: Task) -> None:
        if task.key in found:
            return
        for need in task.needs:
            visit(need)
        found[task.key] = task

    for task in tasks:
        visit(task)
    return found


def find_missing(tasks: Iterable[Task], is_done: Callable[[Task], bool]) -> set[str]:
    """Keys of what must be done before all these are; what a finished task needed is not.

    Args:
        tasks: What is wanted.
        is_done: Whether a task is finished.
    """
    missing: set[str] = set()
    seen: set[str] = set()
    waiting = list(tasks)
    while waiting:
        task = waiting.pop()
        if task.key in seen:
            continue
        seen.add(task.key)
        if not is_done(task):
            missing.add(task.key)
            waiting += task.needs
    return missing


def measure_paths(tasks: Mapping[str, Task]) -> dict[str, float]:
    """Seconds from a task's start to the end of the longest chain that rests on it, by key.

    Args:
        tasks: As `collect_tasks` orders them.
    """
    tails = dict.fromkeys(tasks, 0.0)
    paths: dict[str, float] = {}
    for key in reversed(list(tasks)):
        task = tasks[key]
        paths[key] = task.seconds + tails[key]
        for need in task.needs:
            if need.key in tails:
                tails[need.key] = max(tails[need.key], paths[key])
    return paths


def estimate_seconds(
    tasks: Mapping[str, Task],
    done: Collection[str],
    workers: int,
    *,
    left: Mapping[str, float] | None = None,
) -> float:
    """Wall-clock seconds until all tasks are done, longest chains first, on quiet cores.

    Args:
        tasks: As `collect_tasks` orders them.
        done: Keys of finished tasks.
        workers: Tasks that run at once.
        left: Seconds left of tasks that run already, by key.
    """
    paths = measure_paths(tasks)
    running = dict(left or {})
    waiting = {
        key: {need.key for need in task.needs if need.key not in done}
        for key, task in tasks.items()
        if key not in done and key not in running
    }
    ends = [(seconds, key) for key, seconds in running.items()]
    heapq.heapify(ends)
    ready = [(-paths[key], key) for key, needs in waiting.items() if not needs]
    heapq.heapify(ready)
    now = 0.0
    while ready or ends:
        while ready and len(ends) < workers:
            _, key = heapq.heappop(ready)
            heapq.heappush(ends, (now + tasks[key].seconds, key))
        now, ended = heapq.heappop(ends)
        for key in _release(waiting, ended):
            heapq.heappush(ready, (-paths[key], key))
    return now


def _release(waiting: Mapping[str, set[str]], ended: str) -> Sequence[str]:
    """Keys of what waited for this task only."""
    released = []
    for key, needs in waiting.items():
        if ended in needs:
            needs.remove(ended)
            if not needs:
                released.append(key)
    return released
