"""Programs that try to get out of the sandbox, and what each must be stopped for.

One list for the tests and for bench/code_answers.py.
"""

from dataclasses import dataclass

__all__ = ["PROGRAMS", "HostileProgram"]


@dataclass(frozen=True)
class HostileProgram:
    """A program whose function f is called once, without arguments.

    Attributes:
        name: What it tries.
        source: Python.
        stopped: What the report must say, one of these.
    """

    name: str
    source: str
    stopped: tuple[str | None, ...]


def _define(body: str, modules: str = "") -> str:
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return (f"import {modules}\n" if modules else "") + f"def f():\n{lines}"


_RAW = "libc = ctypes.CDLL(None)\n"

PROGRAMS: tuple[HostileProgram, ...] = (
    HostileProgram("endless loop", _define("while True: pass"), ("time",)),
    HostileProgram("endless loop while defining", "while True: pass", ("time",)),
    HostileProgram("long sleep", _define("time.sleep(3600)", "time"), ("time",)),
    HostileProgram("power of powers", _define("return 9 ** 9 ** 9"), ("time", "memory")),
    HostileProgram(
        "slow pattern", _define("return re.match('(a+)+$', 'a' * 60 + 'b')", "re"), ("time",)
    ),
    HostileProgram("one large text", _define("return len('x' * 10 ** 10)"), ("memory",)),
    HostileProgram(
        "list that grows",
        _define("kept = []\nwhile True: kept.append(bytearray(10 ** 6))"),
        ("memory",),
    ),
    HostileProgram(
        "memory error caught, then again",
        _define(
            "kept = []\nwhile True:\n    try: kept.append(bytearray(10 ** 6))\n"
            "    except MemoryError: pass"
        ),
        ("time", "memory"),
    ),
    HostileProgram("large result", _define("return 'x' * 10 ** 7"), ("output",)),
    HostileProgram(
        "endless writing", _define("while True: os.write(1, b'x' * 10 ** 5)", "os"), ("output",)
    ),
    HostileProgram("fork", _define("return os.fork()", "os"), ("processes",)),
    HostileProgram("fork bomb", _define("while True: os.fork()", "os"), ("processes",)),
    HostileProgram(
        "fork, error caught",
        _define("try: os.fork()\nexcept BaseException: pass\nreturn 1", "os"),
        ("processes",),
    ),
    HostileProgram(
        "fork by number", _define(_RAW + "return libc.fork()", "ctypes"), ("processes",)
    ),
    HostileProgram(
        "shell command",
        _define("return os.system('touch /tmp/molora-hostile')", "os"),
        ("processes",),
    ),
    HostileProgram(
        "program", _define("return subprocess.run(['id'])", "subprocess"), ("processes",)
    ),
    HostileProgram("exec", _define("os.execv('/bin/sh', ['sh'])", "os"), ("processes",)),
    HostileProgram(
        "thread", _define("threading.Thread(target=print).start()", "threading"), ("processes",)
    ),
    HostileProgram(
        "signal to its parent", _define("os.kill(os.getppid(), 9)", "os"), ("processes",)
    ),
    HostileProgram(
        "ignoring the time signal",
        _define("signal.signal(signal.SIGXCPU, signal.SIG_IGN)", "signal"),
        ("processes",),
    ),
    HostileProgram("socket", _define("socket.socket()", "socket"), ("network",)),
    HostileProgram(
        "connection",
        _define("socket.create_connection(('127.0.0.1', 80))", "socket"),
        ("network",),
    ),
    HostileProgram(
        "datagram, errors caught",
        _define(
            "try: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))\n"
            "except BaseException: pass",
            "socket",
        ),
        ("network",),
    ),
    HostileProgram(
        "socket by number", _define(_RAW + "return libc.socket(2, 1, 0)", "ctypes"), ("network",)
    ),
    HostileProgram(
        "name look-up",
        _define("socket.getaddrinfo('localhost', 80)", "socket"),
        ("network", "files"),
    ),
    HostileProgram(
        "message on an inherited descriptor",
        _define(
            _RAW + "for descriptor in range(3, 64):\n"
            "    libc.sendmsg(descriptor, ctypes.create_string_buffer(64), 0)",
            "ctypes",
        ),
        ("network",),
    ),
    HostileProgram("file to write", _define("open('/tmp/molora-hostile', 'w')"), ("files",)),
    HostileProgram("file to write here", _define("open('hostile', 'w')"), ("files",)),
    HostileProgram("file to read", _define("return open('/etc/passwd').read()"), ("files",)),
    HostileProgram(
        "file by number",
        _define(_RAW + "return libc.open(b'/tmp/molora-hostile', 66, 511)", "ctypes"),
        ("files",),
    ),
    HostileProgram("removing files", _define("shutil.rmtree('/tmp')", "shutil"), ("files",)),
    HostileProgram("renaming", _define("os.rename('/tmp', '/tmp2')", "os"), ("files",)),
    HostileProgram("listing", _define("return os.listdir('/')", "os"), ("files",)),
    HostileProgram("temporary file", _define("tempfile.mkstemp()", "tempfile"), ("files",)),
    HostileProgram("reading its input", _define("return os.read(0, 10)", "os"), ("files",)),
    HostileProgram(
        "raising its limits",
        _define(_RAW + "return libc.setrlimit(0, ctypes.create_string_buffer(16))", "ctypes"),
        ("system call",),
    ),
    HostileProgram(
        "tracing", _define(_RAW + "return libc.ptrace(16, 1, 0, 0)", "ctypes"), ("processes",)
    ),
    HostileProgram(
        "new namespaces",
        _define(_RAW + "return libc.unshare(0x10000000)", "ctypes"),
        ("system call",),
    ),
    HostileProgram(
        "another filter",
        _define(_RAW + "return libc.prctl(22, 2, 0, 0, 0)", "ctypes"),
        ("system call",),
    ),
    HostileProgram("crash", _define("ctypes.string_at(0)", "ctypes"), ("crash",)),
    HostileProgram("abort", _define("os.abort()", "os"), ("processes",)),
    HostileProgram("leaving", _define("os._exit(0)", "os"), ("exit",)),
    HostileProgram("endless recursion", _define("return f()"), (None,)),
    HostileProgram("deep brackets", "x = " + "(" * 10_000 + ")" * 10_000, (None,)),
    HostileProgram("leaving politely", _define("raise SystemExit"), (None,)),
    HostileProgram("unknown module", _define("return 1", "hostile_module"), (None,)),
)
