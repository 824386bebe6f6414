"""Runs one answer's function on its tests, as a script of a process of its own; see sandbox.py.

It imports the standard library only, and what that costs is paid for every answer: no json, no
site. Whatever the answer does to this process afterwards, the kernel's filter stays.
"""

import builtins
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

__all__ = ["describe_value"]

MAX_DEPTH = 20
OUT_OF_MEMORY = "!killed: memory"

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_NEW_LISTENER = 8
_SIGKILL = 9


class _Sink:
    """Where prints go."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def describe_value(value: Any, depth: int = MAX_DEPTH) -> str:
    """A plain value as text, so that equal values have equal texts.

    Whole floats are written as integers, sets and dictionaries in the order of their texts. What
    is not plain (functions, objects) is "?" and the name of its type.

    Args:
        value: What a function returned.
        depth: Levels of containers to look into.
    """
    kind = type(value)
    if kind is float and value.is_integer() and abs(value) < 2.0**53:
        value, kind = int(value), int
    if kind is int and value.bit_length() >= 4096:
        return hex(value)  # decimal digits of huge numbers are slow to make, and limited
    if value is None or kind in (bool, int, float, complex, str, bytes):
        return repr(value)
    if kind not in (list, tuple, set, frozenset, dict):
        return "?" + kind.__name__[:40]
    if depth == 0:
        return "?deep"
    if kind is dict:
        texts = (
            (describe_value(k, depth - 1), describe_value(v, depth - 1)) for k, v in value.items()
        )
        return "{" + ", ".join(sorted(f"{k}: {v}" for k, v in texts)) + "}"
    items = [describe_value(one, depth - 1) for one in value]
    if kind is list:
        return "[" + ", ".join(items) + "]"
    if kind is tuple:
        return "(" + "".join(item + ", " for item in items) + ")"
    return "set(" + ", ".join(sorted(items)) + ")"


def _preload(modules: list[str]) -> None:
    """Import what the answer may need, while files can still be read; nothing later."""
    for name in modules:
        __import__(name)
    if "random" in sys.modules:
        sys.modules["random"].seed(0)


def _end_imports() -> None:
    """Leave nothing to import that would have to be read from a file."""
    sys.path = []
    sys.path_importer_cache.clear()
    sys.meta_path = sys.meta_path[:2]  # built-in and frozen modules, which are in memory


def _limit(limits: dict[str, int]) -> None:
    import resource

    soft, hard = limits["cpu_seconds"], limits["cpu_seconds"] + 1
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes"], limits["memory_bytes"]))


def _lock(program: bytes, seccomp: int, control: int) -> None:
    """Install the filter, and hand its listener to the process that watches.

    Raises:
        OSError: If the kernel refuses.
    """
    import _socket
    import array
    import ctypes
    import os

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    libc = ctypes.CDLL(None, use_errno=True)
    socket = _socket.socket(fileno=control)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs is not available")
    loaded = Program(len(program) // 8, program)
    place = ctypes.byref(loaded)
    flags = _SECCOMP_FILTER_FLAG_NEW_LISTENER
    listener = libc.syscall(seccomp, _SECCOMP_SET_MODE_FILTER, flags, place)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp with a listener is not available")
    sent = array.array("i", [listener])
    socket.sendmsg([b"ready"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, sent)])
    socket.close()
    os.close(listener)


def _compile(source: str) -> CodeType | None:
    """The program, or None if it is none."""
    compiling = True

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        # To quote a wrong line the compiler opens the file it is from, which nobody asked for.
        if compiling and event == "open":
            raise FileNotFoundError

    sys.addaudithook(refuse)
    try:
        return compile(source, "answer", "exec", dont_inherit=True)
    except BaseException:  # MemoryError and RecursionError too: nobody can run it
        return None
    finally:
        compiling = False


def _answer(
    job: dict[str, Any], write: Callable[[int, bytes], int], quote: Callable[[str], str]
) -> None:
    """Compile, define and call; one line an outcome, at once."""
    code = _compile(job["source"])
    if code is None:
        write(1, b"false\n")
        return
    space: dict[str, Any] = {"__name__": "answer", "__builtins__": builtins}

    def define() -> str:
        exec(code, space)
        return "" if job["function"] in space else "!missing"

    def attempt(act: Callable[[], str]) -> str:
        try:
            return act()
        except MemoryError:
            return OUT_OF_MEMORY
        except BaseException as error:  # SystemExit too: nothing an answer raises ends the tests
            return "!" + type(error).__name__[:40]

    write(1, b"true\n")
    undefined = attempt(define)
    for arguments in job["tests"]:

        def call(arguments: list[Any] = arguments) -> str:
            return describe_value(space[job["function"]](*arguments))

        outcome = undefined or attempt(call)
        write(1, (quote(outcome) + "\n").encode())
        if outcome == OUT_OF_MEMORY:
            return


def main() -> None:
    """Read a job from standard input, lock this process, answer."""
    import ctypes
    import marshal
    import os
    from _json import encode_basestring_ascii as quote

    control = int(sys.argv[1])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    if os.getppid() != int(sys.argv[2]):
        return  # it ended before it was told of
    job = marshal.loads(sys.stdin.buffer.read())  # from the process that started this one
    _preload(job["modules"])
    write, leave = os.write, os._exit
    sys.stdin, sys.stdout, sys.stderr = None, _Sink(), _Sink()
    os.closerange(0, 1)
    os.closerange(2, 3)
    try:
        _limit(job["limits"])
        _lock(job["filter"], job["seccomp"], control)
    except (OSError, ValueError) as error:
        try:
            write(control, f"{error}".encode())
        finally:
            leave(1)  # at once: what ends an interpreter is stopped by the filter already
    _end_imports()
    _answer(job, write, quote)
    leave(0)


if __name__ == "__main__":
    main()
