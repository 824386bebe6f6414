"""What a sandboxed process may ask of the kernel: a filter of system calls, and names for the rest.

Everything that is not on the short list of calls that compute (memory, clock, end) stops the
process. Numbers are the kernel's, by machine.
"""

import platform
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from molora_fed.errors import ConfigError

__all__ = ["Machine", "build_filter", "describe_call", "find_machine"]

# Classic BPF, linux/bpf_common.h and linux/seccomp.h.
_LOAD = 0x20
_JUMP_EQUAL = 0x15
_RETURN = 0x06
_ALLOW = 0x7FFF0000
_NOTIFY = 0x7FC00000
_KILL_PROCESS = 0x80000000
_AT_NUMBER, _AT_MACHINE, _AT_FIRST_ARGUMENT = 0, 4, 16

_ALLOWED = (
    "brk clock_gettime clock_nanosleep close exit exit_group futex getpid getppid "
    "getrandom getrusage gettid gettimeofday madvise mmap mprotect mremap munmap "
    "nanosleep restart_syscall rt_sigprocmask rt_sigreturn sched_yield"
)

_CATEGORIES: Mapping[str, str] = {
    "network": (
        "accept accept4 bind connect getpeername getsockname getsockopt io_uring_setup "
        "listen recvfrom recvmsg sendmsg sendto setsockopt shutdown socket socketpair"
    ),
    "processes": (
        "clone clone3 execve execveat fork kill pipe pipe2 ptrace rt_sigaction tgkill tkill vfork"
    ),
    "files": (
        "access chdir chmod creat dup dup2 dup3 faccessat faccessat2 fchmodat fchownat "
        "fcntl fstat ftruncate getcwd getdents64 ioctl link linkat lseek lstat "
        "memfd_create mkdir mkdirat mknodat newfstatat open openat openat2 read readlink "
        "readlinkat rename renameat renameat2 rmdir stat statx symlink symlinkat truncate "
        "unlink unlinkat write"
    ),
}

_X86_64 = (
    "read=0 write=1 open=2 close=3 stat=4 fstat=5 lstat=6 lseek=8 mmap=9 mprotect=10 munmap=11 "
    "brk=12 rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15 ioctl=16 access=21 pipe=22 "
    "sched_yield=24 mremap=25 madvise=28 dup=32 dup2=33 nanosleep=35 getpid=39 socket=41 "
    "connect=42 accept=43 sendto=44 recvfrom=45 sendmsg=46 recvmsg=47 shutdown=48 bind=49 "
    "listen=50 getsockname=51 getpeername=52 socketpair=53 setsockopt=54 getsockopt=55 clone=56 "
    "fork=57 vfork=58 execve=59 exit=60 kill=62 fcntl=72 truncate=76 ftruncate=77 getcwd=79 "
    "chdir=80 rename=82 mkdir=83 rmdir=84 creat=85 link=86 unlink=87 symlink=88 readlink=89 "
    "chmod=90 gettimeofday=96 getrusage=98 ptrace=101 getppid=110 prctl=157 gettid=186 "
    "tkill=200 futex=202 getdents64=217 restart_syscall=219 clock_gettime=228 "
    "clock_nanosleep=230 exit_group=231 tgkill=234 openat=257 mkdirat=258 mknodat=259 "
    "fchownat=260 newfstatat=262 unlinkat=263 renameat=264 linkat=265 symlinkat=266 "
    "readlinkat=267 fchmodat=268 faccessat=269 unshare=272 accept4=288 dup3=292 pipe2=293 "
    "prlimit64=302 renameat2=316 seccomp=317 getrandom=318 memfd_create=319 execveat=322 "
    "statx=332 io_uring_setup=425 clone3=435 openat2=437 faccessat2=439"
)

_AARCH64 = (
    "getcwd=17 dup=23 dup3=24 fcntl=25 ioctl=29 mknodat=33 mkdirat=34 unlinkat=35 symlinkat=36 "
    "linkat=37 renameat=38 truncate=45 ftruncate=46 faccessat=48 chdir=49 fchmodat=53 "
    "fchownat=54 openat=56 close=57 pipe2=59 getdents64=61 lseek=62 read=63 write=64 "
    "readlinkat=78 newfstatat=79 fstat=80 exit=93 exit_group=94 unshare=97 futex=98 "
    "nanosleep=101 clock_gettime=113 clock_nanosleep=115 ptrace=117 sched_yield=124 "
    "restart_syscall=128 kill=129 tkill=130 tgkill=131 rt_sigaction=134 rt_sigprocmask=135 "
    "rt_sigreturn=139 getrusage=165 prctl=167 gettimeofday=169 getpid=172 getppid=173 "
    "gettid=178 socket=198 socketpair=199 bind=200 listen=201 accept=202 connect=203 "
    "getsockname=204 getpeername=205 sendto=206 recvfrom=207 setsockopt=208 getsockopt=209 "
    "shutdown=210 sendmsg=211 recvmsg=212 brk=214 munmap=215 mremap=216 clone=220 execve=221 "
    "mmap=222 mprotect=226 madvise=233 accept4=242 prlimit64=261 renameat2=276 seccomp=277 "
    "getrandom=278 memfd_create=279 execveat=281 statx=291 io_uring_setup=425 clone3=435 "
    "openat2=437 faccessat2=439"
)

_MACHINES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}


@dataclass(frozen=True)
class Machine:
    """Numbers of a machine's system calls.

    Attributes:
        audit: Its number in the filter's records.
        calls: Number of each call by name.
    """

    audit: int
    calls: Mapping[str, int]


def find_machine() -> Machine:
    """The machine this process runs on.

    Raises:
        ConfigError: If it is not Linux on a machine whose calls are known.
    """
    here = f"{sys.platform} {platform.machine()}"
    found = _MACHINES.get(platform.machine()) if sys.platform == "linux" else None
    if found is None or struct.calcsize("P") != 8:
        raise ConfigError(
            f"Cannot run code answers here: expected Linux on x86_64 or aarch64, whose kernel can "
            f"cut a program off, got {here}. Leave tasks with the extractor 'code-tests' out."
        )
    pairs = (word.split("=") for word in found[1].split())
    return Machine(found[0], {name: int(number) for name, number in pairs})


def build_filter(machine: Machine, *, result: int, control: int) -> bytes:
    """The filter as the kernel takes it, eight bytes an instruction.

    Args:
        machine: Whose numbers it uses.
        result: The only file descriptor that may be written.
        control: The only one a message may be sent to; it is closed before an answer runs.
    """
    steps = [
        (_LOAD, 0, 0, _AT_MACHINE),
        (_JUMP_EQUAL, 1, 0, machine.audit),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _AT_NUMBER),
    ]
    for name in _ALLOWED.split():
        steps += [(_JUMP_EQUAL, 0, 1, machine.calls[name]), (_RETURN, 0, 0, _ALLOW)]
    for name, descriptor in (("write", result), ("sendmsg", control)):
        steps += [
            (_JUMP_EQUAL, 0, 4, machine.calls[name]),
            (_LOAD, 0, 0, _AT_FIRST_ARGUMENT),
            (_JUMP_EQUAL, 0, 1, descriptor),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _NOTIFY),
        ]
    steps.append((_RETURN, 0, 0, _NOTIFY))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def describe_call(machine: Machine, number: int) -> tuple[str, str]:
    """Category and name of a call that was stopped, e.g. ("network", "socket")."""
    names = {value: name for name, value in machine.calls.items()}
    name = names.get(number, f"number {number}")
    for category, members in _CATEGORIES.items():
        if name in members.split():
            return category, name
    return "system call", name
