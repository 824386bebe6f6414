"""Waiting for events of real processes, finding what they left, and disks that can be filled."""

import contextlib
import os
import shutil
import subprocess
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


class Mount:
    """A small file system in memory at a folder, if this user may mount one.

    Args:
        folder: Where; made.
        num_bytes: Its size.

    Attributes:
        is_there: Whether there is one.
    """

    def __init__(self, folder, num_bytes=16 * 2**20):
        folder.mkdir(parents=True)
        self._folder = folder
        self._num_bytes = num_bytes
        self.is_there = os.geteuid() == 0 and self._call(
            "mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)
        )

    @staticmethod
    def _call(*command):
        if shutil.which(command[0]) is None:
            return False
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def _resize(self, num_bytes):
        return self._call("mount", "-o", f"remount,size={num_bytes}", str(self._folder))

    def fill(self):
        """Leave no free page."""

        def shrink():
            status = os.statvfs(self._folder)
            return self._resize(max(1, status.f_blocks - status.f_bfree) * status.f_frsize)

        # Refused if something was written meanwhile.
        wait_until(shrink, seconds=20, what="filling the disk")

    def empty(self):
        """Leave space again."""
        if not self._resize(self._num_bytes):
            raise RuntimeError("the mounted file system cannot be resized")

    def close(self):
        """Unmount."""
        if self.is_there:
            self._call("umount", str(self._folder))
            self.is_there = False
