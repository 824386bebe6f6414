"""Keys decide what is shared; needs come first; estimates keep the critical path."""

from hypothesis import given
from hypothesis import strategies as st
from molora_studies.framework.schedule import (
    collect_tasks,
    estimate_seconds,
    find_missing,
    measure_paths,
)
from molora_studies.framework.worker import decode_task, encode_line, encode_task
from trivial_study import plan_number


@st.composite
def graphs(draw):
    """Tasks that need some of those before them, in order."""
    tasks = []
    for number in range(draw(st.integers(1, 9))):
        needs = draw(st.lists(st.sampled_from(tasks), unique_by=id)) if tasks else []
        tasks.append(plan_number(number, *needs, seconds=draw(st.floats(0.1, 50))))
    return tasks


@given(graphs())
def test_needs_come_before_what_needs_them_and_each_task_once(tasks):
    ordered = list(collect_tasks([*tasks, *tasks]).values())
    assert {task.key for task in ordered} == {task.key for task in tasks}
    places = {task.key: place for place, task in enumerate(ordered)}
    for task in ordered:
        assert all(places[need.key] < places[task.key] for need in task.needs)


@given(graphs(), st.integers(1, 5))
def test_estimate_lies_between_its_bounds_and_falls_with_what_is_done(tasks, workers):
    by_key = collect_tasks(tasks)
    whole = estimate_seconds(by_key, set(), workers)
    work = sum(task.seconds for task in by_key.values())
    longest = max(measure_paths(by_key).values())
    assert max(longest, work / workers) - 1e-6 <= whole <= work + 1e-6
    assert abs(estimate_seconds(by_key, set(), 1) - work) < 1e-6
    assert estimate_seconds(by_key, set(by_key), workers) == 0


@given(graphs(), st.data())
def test_only_what_is_not_done_and_still_needed_is_missing(tasks, data):
    done = data.draw(st.sets(st.sampled_from([task.key for task in tasks])))
    missing = find_missing([tasks[-1]], lambda task: task.key in done)
    assert not missing & done
    assert (tasks[-1].key in missing) == (tasks[-1].key not in done)
    for task in tasks:
        if task.key in missing:
            assert all(need.key in missing | done for need in task.needs)


@given(graphs())
def test_a_task_sent_to_a_worker_keeps_its_key(tasks):
    assert decode_task(encode_task(tasks[-1])).key == tasks[-1].key


def test_same_settings_share_a_key_and_any_difference_makes_another():
    first = plan_number(1)
    assert plan_number(2, first).key == plan_number(2, plan_number(1)).key
    others = [plan_number(3, first), plan_number(2), plan_number(2, plan_number(4))]
    assert len({task.key for task in [plan_number(2, first), *others]}) == 4


def test_running_tasks_count_with_what_is_left_of_them():
    tasks = collect_tasks([plan_number(2, plan_number(1, seconds=10), seconds=5)])
    first = next(iter(tasks))
    assert estimate_seconds(tasks, set(), 2, left={first: 3.0}) == 8.0


def test_a_message_carries_any_figure():
    line = encode_line({"loss": float("nan"), "of": [float("inf"), 1], "kind": {1: object}})
    assert line.startswith(b'{"loss": null, "of": [null, 1], "kind": {"1": "<class')
