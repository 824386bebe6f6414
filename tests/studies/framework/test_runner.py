"""Tasks run once, in parallel, in processes; failures stay where they are; kills lose nothing."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from molora_studies.framework.contract import Task
from molora_studies.framework.runner import run_tasks
from molora_studies.framework.store import TaskStore
from trivial_study import plan_number

from molora_fed.errors import StudyError

HERE = Path(__file__).parent
SECONDS = 60


def read_runs(cache, task):
    """Process ids of every time a task ran."""
    file = TaskStore.in_cache(cache).folder(task) / "runs.txt"
    return file.read_text().split() if file.exists() else []


def wait_until(condition, what):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, f"waited too long for {what}"
        time.sleep(0.02)


class Log:
    """Keeps what a listener hears."""

    def __init__(self):
        self.lines, self.most, self.progress = [], 0, []

    def started(self, task):
        self.lines.append(("started", task.name))

    def ended(self, task, failure):
        self.lines.append(("failed" if failure else "done", task.name))

    def update(self, state):
        self.most = max(self.most, len(state.running))
        self.progress += [(job.done, job.total) for job in state.running if job.total]


def test_needs_are_done_first_and_everything_once(cache):
    first = plan_number(1)
    wanted = [plan_number(2, first), plan_number(3, first), plan_number(3, plan_number(1))]
    log = Log()
    state = run_tasks(wanted, cache, workers=2, listener=log)
    store = TaskStore.in_cache(cache)
    assert not state.failures and state.seconds_left == 0
    assert [store.read(task)[0].result["sum"] for task in wanted] == [3, 4, 4]
    assert store.read(first)[0].result["threads"] == "1"
    assert log.lines[:2] == [("started", "add 1"), ("done", "add 1")]
    assert len(log.lines) == 6
    assert "adding 1" in (store.folder(first) / "log.txt").read_text()
    assert not run_tasks(wanted, cache, workers=2).failures
    assert all(len(read_runs(cache, task)) == 1 for task in (first, *wanted))


def test_independent_tasks_run_at_once_and_tell_their_progress(cache, tmp_path):
    gate = tmp_path / "gate"
    waiting = [plan_number(n, wait_for=str(gate)) for n in (1, 2)]

    class Opener(Log):
        def update(self, state):
            super().update(state)
            if len(self.progress) >= 4 and not gate.exists():
                gate.touch()

    log = Opener()
    assert not run_tasks(waiting, cache, workers=2, listener=log).failures
    assert log.most == 2 and log.progress[0][1] == 6000


def test_a_failure_takes_along_only_what_rests_on_it(cache, tmp_path):
    mend = tmp_path / "mend"
    bad = plan_number(1, fail=str(mend))
    wanted = [plan_number(2, bad), plan_number(3), plan_number(4, plan_number(2, bad))]
    state = run_tasks(wanted, cache, workers=2)
    assert [failure.task.key for failure in state.failures] == [bad.key]
    assert state.failures[0].message == "unexpected ValueError: as asked"
    assert "trivial_study.py" in state.failures[0].trace.read_text()
    assert state.skipped == {wanted[0].key, wanted[2].key}
    assert state.done == {wanted[1].key}
    mend.touch()
    assert not run_tasks(wanted, cache, workers=2).failures
    assert len(read_runs(cache, bad)) == 2 and len(read_runs(cache, wanted[1])) == 1
    assert not state.failures[0].trace.exists()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (plan_number(1, die=True), "its process was killed; is there enough memory?"),
        (Task("x", "trivial_study:answer_badly", {"how": "nan"}), "expected finite JSON values"),
        (Task("x", "trivial_study:answer_badly", {"how": "large"}), "expected at most 8388608"),
        (Task("x", "trivial_study:answer_badly", {"how": "list"}), "expected a mapping, got list"),
        (Task("x", "trivial_study:nothing", {}), "expected a function 'trivial_study:nothing'"),
        (Task("x", "no_such_module:f", {}), "No module named 'no_such_module'"),
    ],
)
def test_a_broken_task_is_a_failure_of_its_own(cache, task, message):
    state = run_tasks([task, plan_number(7)], cache, workers=1)
    assert message in state.failures[0].message and "\n" not in state.failures[0].message
    assert state.done == {plan_number(7).key}


def test_a_malformed_result_is_one_line(cache):
    task = plan_number(1)
    store = TaskStore.in_cache(cache)
    store.write(task, {"sum": 1}, 0.5)
    assert store.read(task)[1] == 0.5
    (store.folder(task) / "result.json").write_text("{")
    with pytest.raises(StudyError, match="Remove its folder and run the study again"):
        store.read(task)


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, HERE / "molora_with_sums.py", "study", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def plan_waiting(tmp_path, **more):
    """Config of a study whose last task waits for a file, that file, and the task."""
    gate = tmp_path / "gate"
    config = tmp_path / "sums.toml"
    last = {"wait_for": str(gate), **more}
    config.write_text("count = 3\n[last]\n" + "".join(f"{k} = '{v}'\n" for k, v in last.items()))
    return config, gate, plan_number(4, plan_number(1), **last)


def start_waiting(tmp_path, cache):
    """A study in another process, all done but the last task, which works; and its family."""
    config, gate, last = plan_waiting(tmp_path, child="yes")
    process = start("sums", "--config", config, "--out", tmp_path / "out", "--workers", 2)
    store = TaskStore.in_cache(cache)
    others = [plan_number(n, plan_number(1)) for n in (2, 3)]
    wait_until(lambda: all(map(store.is_done, others)), "the quick tasks")
    wait_until(lambda: (store.folder(last) / "child.txt").exists(), "the slow task")
    family = psutil.Process(process.pid).children(recursive=True)
    family.append(psutil.Process(int((store.folder(last) / "child.txt").read_text())))
    return process, family, config, gate, last


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_study_leaves_no_process_and_goes_on(cache, tmp_path, studies, number):
    process, family, config, gate, last = start_waiting(tmp_path, cache)
    process.send_signal(number)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert err.splitlines() == ["error: stopped. Run the same command again to resume."]
    assert not psutil.wait_procs(family, timeout=10)[1]
    gate.touch()
    again = start("sums", "--config", config, "--out", tmp_path / "out", "--workers", 2)
    out, err = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, err
    assert "3 cells, 4 tasks: 3 done, 1 to do" in out
    assert len(read_runs(cache, last)) == 2
    for task in (plan_number(1), *(plan_number(n, plan_number(1)) for n in (2, 3))):
        assert len(read_runs(cache, task)) == 1
    child = int((TaskStore.in_cache(cache).folder(last) / "child.txt").read_text())
    wait_until(lambda: not psutil.pid_exists(child), "the end of what an action started")


def test_two_studies_at_once_share_their_work(cache, tmp_path):
    config, gate, last = plan_waiting(tmp_path)
    both = [
        start("sums", "--config", config, "--out", tmp_path / f"out{n}", "--workers", 1)
        for n in range(2)
    ]
    wait_until(lambda: read_runs(cache, last), "the slow task")
    gate.touch()
    for process in both:
        err = process.communicate(timeout=SECONDS)[1]
        assert process.returncode == 0, err
    assert len(read_runs(cache, last)) == len(read_runs(cache, plan_number(1))) == 1
    assert (tmp_path / "out0" / "sums.md").read_bytes() == (
        tmp_path / "out1" / "sums.md"
    ).read_bytes()
