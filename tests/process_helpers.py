"""Waiting for events of real processes, and finding what they left."""

import contextlib
import os
import time

import psutil


def wait_until(look, *, seconds=60.0, what="it"):
    """Look until something true is found."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {seconds} s")


def find_processes(root):
    """Every process but this one that works in or below a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = [*process.cmdline(), *process.environ().values()]
            if process.pid != os.getpid() and any(str(root) in word for word in words):
                found.append(process)
    return found
