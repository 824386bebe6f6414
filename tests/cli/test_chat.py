"""`molora chat`: through a pipe, and in a terminal with Ctrl-C."""

import io
import os
import pty
import re
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
from process_helpers import wait_until


@pytest.fixture
def say(molora, fused_once, monkeypatch):
    def run(*lines, options=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        base = fused_once / "tiny" / "base"
        return molora("chat", fused_once / "out", "--base", base, "--max-new-tokens", "8", *options)

    return run


def test_a_pipe_gives_an_answer_a_line_and_the_same_again(say):
    first, again = (say("abc abd", "dcb").out for _ in range(2))
    assert first == again and first.strip()
    assert say("abc abd", "dcb", options=["--seed", "1"]).out != first


def test_commands(say):
    ran = say(
        "/gates", "abc", "/gates", "/model base", "/model nobody", "/reset", "/x", "/quit", "a"
    )
    assert ran.code == 0
    lines = ran.err.splitlines()
    assert lines[0] == "no answer yet"
    assert lines[1].startswith("base answers; there are fused, ")
    assert lines[2].startswith("Cannot let 'nobody' answer")
    assert lines[3] == "forgotten" and lines[4].startswith("unknown command")
    shares = [float(line.split()[1]) for line in ran.out.splitlines() if "█" in line]
    assert sum(shares) == pytest.approx(1.0, abs=0.1)


def test_who_answers_can_be_chosen_at_the_start(say):
    ran = say("abc", "/gates", options=["--model", "base"])
    assert re.search(r"^base +1\.00", ran.out, re.MULTILINE)
    ran = say("abc", options=["--model", "nobody"])
    assert ran.code == 10 and "expected one of fused" in ran.err


def test_experts_are_chosen_after_what_was_said(say):
    ran = say("abc", "/gates", options=["--experts", "merged"])
    shares = [float(line.split()[1]) for line in ran.out.splitlines() if "█" in line]
    assert ran.code == 0 and sum(shares) == pytest.approx(1.0, abs=0.1)
    ran = say("abc", options=["--experts", "best"])
    assert ran.code == 2 and "expected a number from 1 on or 'merged'" in ran.err


def test_what_does_not_fit_any_more_is_left_out_and_said(say):
    ran = say(*["abcd " * 8] * 4)
    assert "turns no longer fit" in ran.err
    ran = say("abcd " * 100)
    assert "Say less" in ran.err and ran.code == 0


def press_until_it_ends(process):
    """Exit code after Ctrl-C; readline misses one that comes as it begins to wait for a line."""
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            return process.wait(2)
    return None


@pytest.mark.processes
def test_control_c_stops_an_answer_and_twice_ends(fused_once):
    main, side = pty.openpty()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "molora_cli.main", "chat", str(fused_once / "out"),
            "--base", str(fused_once / "tiny" / "base"), "--max-new-tokens", "100",
        ],
        stdin=side, stdout=side, stderr=side, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"},
    )  # fmt: skip
    os.close(side)
    seen = bytearray()

    def read_until(word, count=1):
        def look():
            seen.extend(os.read(main, 65_536))
            return seen.count(word) >= count

        wait_until(look, what=repr(word))

    try:
        read_until(b"> ")
        os.write(main, b"abc\n")
        read_until(b"> ", 2)
        process.send_signal(signal.SIGINT)
        read_until(b"Ctrl-C again ends")
        os.write(main, b"/gates\n")
        read_until(b"0.", 2)
        process.send_signal(signal.SIGINT)
        read_until(b"Ctrl-C again ends", 2)
        assert press_until_it_ends(process) == 130
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(main)
