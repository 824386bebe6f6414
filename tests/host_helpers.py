"""Hosts on one machine: a network namespace and a user each, and a link to the first of them.

Needs root, `ip` and `setpriv`.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

__all__ = ["MOLORA", "Host", "can_make_hosts", "linked_hosts"]

MOLORA = Path(sys.executable).parent / "molora"
_FIRST_UID = 20_001
_LINK = "m0"
# Under the only folder that keeps others out lies the interpreter; a namespace may see it alone.
_REMAP = (
    'mount --bind "$0" /mnt && mount -t tmpfs -o mode=755 none "$1" && mkdir -p "$0" '
    '&& mount --move /mnt "$0" && shift && exec "$@"'
)


def can_make_hosts() -> bool:
    """Whether this user may make namespaces and be other users."""
    return os.geteuid() == 0 and all(map(shutil.which, ("ip", "setpriv")))


def _find_closed(path: Path) -> Path | None:
    """The outermost folder above a path that other users cannot enter."""
    return next((p for p in reversed(path.parents) if not p.stat().st_mode & 0o001), None)


class Host:
    """A namespace with one address, and a user whose home is there.

    Args:
        root: Folder for the homes of all hosts.
        name: Of the host; its home has it, too.
        number: From 0; the last part of address and user follow from it.

    Attributes:
        namespace: Name of the namespace, which no other process of this machine makes.
        address: Its address on the links.
        uid: User and group that its commands run as.
        home: The user's home, closed to others.
    """

    def __init__(self, root: Path, name: str, number: int) -> None:
        self.namespace = f"molora-{os.getpid()}-{name}"
        self.address, self.uid = f"10.77.0.{number + 1}", _FIRST_UID + number
        self.home = root / name
        self.home.mkdir(mode=0o700)
        os.chown(self.home, self.uid, self.uid)

    def wrap(self, *command: object) -> list[str]:
        """A command's words, so that it runs here, as this user."""
        become = [
            "ip", "netns", "exec", self.namespace, "setpriv", f"--reuid={self.uid}",
            f"--regid={self.uid}", "--clear-groups", "env", f"HOME={self.home}",
            f"MOLORA_CACHE={self.home / 'cache'}", "OMP_NUM_THREADS=1", *map(str, command),
        ]  # fmt: skip
        prefix = Path(sys.base_prefix)
        if (closed := _find_closed(prefix)) is None:
            return become
        return [*become[:4], "sh", "-c", _REMAP, str(prefix), str(closed), *become[4:]]

    def run(self, *command: object, timeout: float = 1_800.0) -> str:
        """Run a command in the home, and give its standard output.

        Raises:
            AssertionError: If it fails; with its standard error.
        """
        done = subprocess.run(
            self.wrap(*command), cwd=self.home, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def own(self, path: Path) -> Path:
        """Give a file or folder below the home, with all in it, to the user."""
        for each in (path, *path.rglob("*")):
            os.chown(each, self.uid, self.uid)
        return path

    def read_wire(self) -> tuple[int, int]:
        """Bytes that the link has brought here and taken away, frames and all."""
        command = ["ip", "-n", self.namespace, "-json", "-statistics", "link", "show", _LINK]
        (link,) = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        return link["stats64"]["rx"]["bytes"], link["stats64"]["tx"]["bytes"]


@contextmanager
def linked_hosts(*names: str) -> Iterator[list[Host]]:
    """Hosts, each but the first with a link to the first; gone afterwards with all that runs there.

    Args:
        names: Of the hosts, a few letters each.
    """
    root = Path(tempfile.mkdtemp(prefix="molora-hosts-"))
    root.chmod(0o711)
    hosts = [Host(root, name, number) for number, name in enumerate(names)]
    try:
        for host in hosts:
            subprocess.run(["ip", "netns", "add", host.namespace], check=True)
            _ip(host, "link", "set", "lo", "up")
        for number, host in enumerate(hosts[1:], 1):
            _link(hosts[0], f"m{number}", host)
        yield hosts
    finally:
        for host in hosts:
            _end_processes(host)
            subprocess.run(["ip", "netns", "delete", host.namespace], check=False)
        shutil.rmtree(root, ignore_errors=True)


def _ip(host: Host, *words: str) -> None:
    subprocess.run(["ip", "-n", host.namespace, *words], check=True)


def _link(first: Host, device: str, other: Host) -> None:
    """A link of two ends; the first host has the same address on all of its links."""
    there = ["type", "veth", "peer", "name", _LINK, "netns", other.namespace]
    _ip(first, "link", "add", device, *there)
    for host, name, peer in ((first, device, other), (other, _LINK, first)):
        _ip(host, "addr", "add", host.address, "peer", peer.address, "dev", name)
        _ip(host, "link", "set", name, "up")


def _end_processes(host: Host) -> None:
    found = subprocess.run(
        ["ip", "netns", "pids", host.namespace], capture_output=True, text=True, check=False
    )
    for pid in found.stdout.split():
        with suppress(psutil.NoSuchProcess):
            psutil.Process(int(pid)).kill()
