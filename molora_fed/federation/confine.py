"""A process gives up the files and ports it does not need (Landlock, Linux 5.13 and later).

Whoever takes over a process that speaks to the network then finds its mailbox and its own key,
neither texts nor signing keys. Without Landlock (other systems, older kernels) a process keeps its
user's rights; `confine` says so, and its caller logs it.
"""

import ctypes
import os
import ssl
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

import molora_fed

__all__ = ["confine", "describe_confinement"]

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on all architectures
_RULE_PATH = 1
_NO_NEW_PRIVILEGES = 38
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _DEVICES = 1, 2, 4, 8, 1 << 14, 1 << 15
_REFER = 1 << 13
_ALL_FILES = (1 << 13) - 1  # of the first version
_MAKE = _ALL_FILES & ~(_EXECUTE | 1 << 6 | 1 << 11)  # no devices
_BIND, _CONNECT = 1, 2
_SCOPES = 3  # abstract sockets and signals

_SYSTEM = (
    "/usr", "/lib", "/lib64", "/etc/ssl", "/etc/pki", "/etc/ca-certificates", "/etc/resolv.conf",
    "/etc/hosts", "/etc/host.conf", "/etc/nsswitch.conf", "/etc/gai.conf", "/etc/localtime",
    "/run/systemd/resolve", "/dev/urandom", "/dev/random",
)  # fmt: skip


def confine(*, read: Iterable[Path], write: Iterable[Path], network: bool) -> str:
    """Restrict this process, and all it starts, to some files; call it before threads exist.

    Python, its packages and the system's libraries stay readable. Of ports, a process without
    network can neither open nor reach one (Linux 6.7); descriptors that are open stay usable.

    Args:
        read: Files and folders it may read; what does not exist is left out.
        write: Files and folders it may also change.
        network: Whether it may open and reach TCP ports.

    Returns:
        Empty if it is in force, else why it is not.
    """
    reason = describe_confinement()
    if reason:
        return reason
    libc = ctypes.CDLL(None, use_errno=True)
    version = _read_version(libc)
    files = _ALL_FILES
    files |= _REFER if version >= 2 else 0
    files |= _TRUNCATE if version >= 3 else 0
    files |= _DEVICES if version >= 5 else 0
    ports = _BIND | _CONNECT if version >= 4 and not network else 0
    scopes = _SCOPES if version >= 6 else 0
    known = struct.pack("QQQ", files, ports, scopes)
    ruleset = libc.syscall(
        _CREATE_RULESET, known, ctypes.c_size_t(24 if scopes else 16 if version >= 4 else 8), 0
    )
    if ruleset < 0:
        return f"Landlock refused its rules ({os.strerror(ctypes.get_errno())})"
    try:
        own = [Path(name) for name in (*_SYSTEM, sys.prefix, sys.base_prefix)]
        for path in (*own, *_list_code(), *read):
            _allow(libc, ruleset, path, files & (_EXECUTE | _READ_FILE | _READ_DIR))
        for path in (Path("/dev/null"), *write):
            _allow(libc, ruleset, path, files & (_MAKE | _REFER | _TRUNCATE))
        if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.syscall(_RESTRICT_SELF, ruleset, 0):
            return f"Landlock refused ({os.strerror(ctypes.get_errno())})"
    finally:
        os.close(ruleset)
    return ""


def describe_confinement() -> str:
    """Why processes cannot be confined on this system; empty if they can."""
    if sys.platform != "linux":
        return "this system has no Landlock"
    if _read_version(ctypes.CDLL(None, use_errno=True)) < 1:
        return f"this kernel has no Landlock ({os.strerror(ctypes.get_errno())})"
    return ""


def _read_version(libc: ctypes.CDLL) -> int:
    return int(libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def _list_code() -> list[Path]:
    """Where this package lies, and the certificates that are trusted by default."""
    trusted = ssl.get_default_verify_paths()
    folders = [Path(name) for name in (trusted.cafile, trusted.capath) if name]
    return [Path(molora_fed.__file__).parent, *folders]


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not there
    try:
        if not path.is_dir():
            rights &= _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
        rule = struct.pack("=Qi", rights, descriptor)
        libc.syscall(_ADD_RULE, ruleset, _RULE_PATH, rule, 0)
    finally:
        os.close(descriptor)
