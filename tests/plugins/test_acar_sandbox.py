"""Programs that fork, loop, allocate, write or connect are stopped, and nothing is left of them."""

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from molora_acar import sandbox
from molora_acar.code_answers import MAX_PROGRAM, extract_code, format_outcomes
from molora_acar.hostile_programs import PROGRAMS
from molora_acar.sandbox import Limits, run_function
from molora_acar.sandbox_child import describe_value
from molora_acar.sandbox_filter import describe_call, find_machine

from molora_fed.cascade.contract import CascadeTask
from molora_fed.errors import ConfigError

SHORT = Limits(cpu_seconds=1, wall_seconds=30.0, memory_bytes=128 * 2**20, result_bytes=2**16)


def code_task(*arguments, before=""):
    tests = [{"arguments": list(one)} for one in arguments]
    details = {"function": "f", "before": before, "tests": tests}
    return CascadeTask("t", "code", "prompt", "code-tests", details=details)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda one: one.name.replace(" ", "-"))
def test_hostile_program_is_stopped(program):
    before = set(os.listdir("/proc/self/fd")), set(psutil.Process().children(recursive=True))
    limits = replace(SHORT, wall_seconds=1.0) if "sleep" in program.name else SHORT
    report = run_function(program.source, "f", [[]], limits)
    assert report.stopped in program.stopped, report
    assert set(os.listdir("/proc/self/fd")) == before[0]
    assert set(psutil.Process().children(recursive=True)) == before[1]
    assert not Path("/tmp/molora-hostile").exists()


def test_outcomes_before_a_stop_are_kept():
    source = "def f(n):\n    return n if n < 2 else open('x')"
    report = run_function(source, "f", [[0], [1], [2], [0]], SHORT)
    assert (report.outcomes, report.stopped, report.call) == (("0", "1"), "files", "openat")
    assert extract_code(code_task([0], [2], [1]), source) == '["0","!killed: files","!not run"]'


def test_answers_that_compute_agree_and_others_do_not():
    task = code_task([1, 2], [5, 0], before="def f(a, b):\n    return ")
    right = format_outcomes([3, 5])
    assert extract_code(task, "a+b") == extract_code(task, " b + a\n") == right == '["3","5"]'
    assert extract_code(task, "sum([a, b], 0.0)") == right  # whole floats are equal to integers
    assert extract_code(task, "```python\na + b\n```\nas asked") == right
    assert extract_code(task, "a / b") == '["0.5","!ZeroDivisionError"]'
    assert extract_code(task, "a * b") == '["2","0"]'


def test_a_program_cannot_know_what_is_right_and_cannot_claim_it():
    claim = 'import os\ndef f():\n    os.write(1, b\'true\\n"7"\\n{}\\n"x\')\n    return 1'
    assert run_function(claim, "f", [[], []], SHORT).outcomes == ("!garbled", "7")


@pytest.mark.parametrize("text", ["", "  \n", "a +", "def f(:", "x" * MAX_PROGRAM + "y", "a\0b"])
def test_text_that_is_no_program_has_no_answer(text):
    assert extract_code(code_task([1]), text) is None


def test_what_is_missing_or_raises_is_an_outcome():
    assert extract_code(code_task([1]), "g = 1") == '["!missing"]'
    assert extract_code(code_task([1], [2]), "1 / 0") == (
        '["!ZeroDivisionError","!ZeroDivisionError"]'
    )
    assert extract_code(code_task([1]), "import this_is_no_module") == '["!ModuleNotFoundError"]'
    assert extract_code(code_task([1]), "def f(a): return f") == '["?function"]'


def test_modules_work_and_order_is_the_same_in_every_process():
    source = (
        "import collections, datetime, decimal, fractions, itertools, json, math, random, re\n"
        "def f(words):\n"
        "    date = datetime.datetime.strptime('2024-02-29', '%Y-%m-%d').day\n"
        "    return [list(set(words)), random.random(), date, 'é'.encode('latin-1'), math.pi]"
    )
    words = ["one", "two", "three", "four"]
    reports = {run_function(source, "f", [[words]], SHORT) for _ in range(2)}
    assert len(reports) == 1
    (report,) = reports
    assert report.stopped is None
    assert "29, b'\\xe9', 3.14159" in report.outcomes[0]


def test_long_outcomes_are_hashed():
    (outcome,) = run_function("def f(): return 'x' * 1000", "f", [[]], SHORT).outcomes
    assert outcome.startswith("sha256:") and len(outcome) == 71


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.0, "2"),
        (0.5, "0.5"),
        (float("nan"), "nan"),
        (True, "True"),
        ((1,), "(1, )"),
        ({"b": 1, "a": [2.0]}, "{'a': [2], 'b': 1}"),
        ({3, 1}, "set(1, 3)"),
        (frozenset(), "set()"),
        ("it's", '"it\'s"'),
        (object(), "?object"),
        (1 << 5000, hex(1 << 5000)),
    ],
)
def test_values_have_one_text(value, text):
    assert describe_value(value) == text


def test_a_value_that_contains_itself_ends():
    value = []
    value.append(value)
    assert describe_value(value).startswith("[[[") and "?deep" in describe_value(value)


@pytest.mark.parametrize(
    "details", [{}, {"function": "f"}, {"function": "f", "tests": [{"call": 1}]}]
)
def test_a_task_without_tests_is_refused(details):
    task = CascadeTask("broken", "code", "prompt", "code-tests", details=details)
    with pytest.raises(ConfigError, match=r"'broken'.*'tests'"):
        extract_code(task, "def f(): pass")


def test_many_at_once():
    def add(number):
        return run_function("def f(a): return a + 1", "f", [[number]], Limits()).outcomes

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(add, range(12))) == [(str(number + 1),) for number in range(12)]


def test_a_program_ends_with_the_process_that_watches_it():
    lines = (
        "from molora_acar.sandbox import Limits, run_function",
        "source = 'import time\\ndef f(): time.sleep(600)'",
        "run_function('def f(): return 1', 'f', [[]])",
        "print('ready', flush=True)",
        "run_function(source, 'f', [[]], Limits(wall_seconds=600.0))",
    )
    watcher = subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)], stdout=subprocess.PIPE, text=True
    )
    with watcher:
        assert watcher.stdout.readline() == "ready\n"
        found = []
        while not found:
            found = psutil.Process(watcher.pid).children()
        watcher.send_signal(signal.SIGKILL)
        watcher.wait()
    gone, alive = psutil.wait_procs(found, timeout=20)
    assert gone and not alive


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv to give rights away")
def test_it_needs_no_rights():
    code = (
        "from molora_acar.sandbox import run_function\n"
        "rights = open('/proc/self/status').read().split('CapEff:')[1].split()[0]\n"
        "print(int(rights, 16), run_function('import os\\ndef f(): os.fork()', 'f', [[]]).stopped)"
    )
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    command = [*drop, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "0 processes\n"


def test_refused_where_the_kernel_is_not_known(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "pdp11")
    with pytest.raises(ConfigError, match=r"expected Linux on x86_64 or aarch64.*pdp11"):
        find_machine()


def test_refused_where_a_trial_is_not_stopped(monkeypatch):
    allow_all = (6).to_bytes(2, "little") + bytes(2) + (0x7FFF0000).to_bytes(4, "little")
    monkeypatch.setattr(sandbox, "build_filter", lambda *_, **__: allow_all)
    sandbox.check_sandbox.cache_clear()
    with pytest.raises(ConfigError, match="expected a trial to be stopped for network"):
        run_function("def f(): return 1", "f", [[]])
    sandbox.check_sandbox.cache_clear()


def test_refused_where_the_kernel_takes_no_filter(monkeypatch):
    monkeypatch.setattr(sandbox, "build_filter", lambda *_, **__: bytes(8))
    sandbox.check_sandbox.cache_clear()
    with pytest.raises(ConfigError, match=r"locks a program down.*Invalid argument|seccomp"):
        run_function("def f(): return 1", "f", [[]])
    sandbox.check_sandbox.cache_clear()


def test_calls_are_named():
    machine = find_machine()
    assert describe_call(machine, machine.calls["socket"]) == ("network", "socket")
    assert describe_call(machine, 9999) == ("system call", "number 9999")
    numbers = list(machine.calls.values())
    assert len(numbers) == len(set(numbers))
    assert describe_call(machine, machine.calls["unshare"]) == ("system call", "unshare")
