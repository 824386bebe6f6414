"""An OpenAI-compatible endpoint on loopback that does everything wrong an endpoint can."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["FAULTS", "FaultyEndpoint", "serve_faults"]

FAULTS = (
    "silent",
    "broken",
    "denied",
    "busy",
    "malformed",
    "strange",
    "empty",
    "wordless",
    "huge",
    "long",
    "packed",
    "dripping",
    "cut",
    "elsewhere",
)
"""Model names, each with a fault of its own; "good" answers x."""

_GOOD: dict[str, Any] = {
    "choices": [{"message": {"content": "x"}, "text": "x"}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 3},
}
_LONGEST_SILENCE = 20.0


class FaultyEndpoint(ThreadingHTTPServer):
    """The server.

    Attributes:
        url: Address for `EndpointSource`.
        seen: Path, headers and body of every request, in order.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.stopping = threading.Event()
        self._mutex = threading.Lock()

    def note(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> int:
        """Keep a request, and give its number among those of its model.

        Args:
            path: Its path.
            headers: Its headers.
            body: Its JSON.
        """
        with self._mutex:
            self.seen.append((path, headers, body))
            return sum(one[2]["model"] == body["model"] for one in self.seen)


class _Handler(BaseHTTPRequestHandler):
    """Answers as the model's name says."""

    server: FaultyEndpoint

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        count = self.server.note(self.path, dict(self.headers), body)
        with suppress(BrokenPipeError, ConnectionResetError):  # the client had enough
            getattr(self, f"_answer_{body['model']}")(count)

    def _reply(self, data: bytes | dict[str, Any], status: int = 200, **headers: str) -> None:
        content = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _answer_good(self, _: int) -> None:
        self._reply(_GOOD)

    def _answer_silent(self, _: int) -> None:
        self.server.stopping.wait(_LONGEST_SILENCE)

    def _answer_broken(self, _: int) -> None:
        self._reply(b"oops", 500)

    def _answer_denied(self, _: int) -> None:
        self._reply(b"no", 401)

    def _answer_busy(self, count: int) -> None:
        """Answers at the third time."""
        if count < 3:
            self._reply(b"", 429, Retry_After="0")
        else:
            self._reply(_GOOD)

    def _answer_malformed(self, _: int) -> None:
        self._reply(b'{"choices": [')

    def _answer_strange(self, _: int) -> None:
        self._reply({"choices": "none"})

    def _answer_empty(self, _: int) -> None:
        self._reply(b"")

    def _answer_wordless(self, _: int) -> None:
        self._reply({**_GOOD, "choices": [{"message": {"content": "  "}}]})

    def _answer_huge(self, _: int) -> None:
        """10 MB, without saying so."""
        self.send_response(200)
        self.end_headers()
        for _piece in range(160):
            self.wfile.write(b"x" * 65_536)

    def _answer_long(self, _: int) -> None:
        self._reply({"choices": [{"message": {"content": "x" * 40_000}}]})

    def _answer_packed(self, _: int) -> None:
        self._reply(gzip.compress(b"x" * 10_000_000), Content_Encoding="gzip")

    def _answer_dripping(self, _: int) -> None:
        self.send_response(200)
        self.end_headers()
        while not self.server.stopping.wait(0.05):
            self.wfile.write(b" ")

    def _answer_cut(self, _: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"{")
        self.close_connection = True

    def _answer_elsewhere(self, _: int) -> None:
        self._reply(b"", 302, Location="http://127.0.0.1:1/")

    def _answer_echo(self, _: int) -> None:
        said = {"message": {"content": self.headers.get("Authorization", "")}}
        self._reply({"choices": [said]})

    def _answer_surrogate(self, _: int) -> None:
        self._reply(b'{"choices": [{"message": {"content": "a\\ud800b"}}]}')

    def _answer_lying(self, _: int) -> None:
        usage = {"prompt_tokens": -5, "completion_tokens": 1e99}
        self._reply({**_GOOD, "usage": usage})


@contextmanager
def serve_faults() -> Iterator[FaultyEndpoint]:
    """Serve on a free port of loopback while the block runs."""
    server = FaultyEndpoint()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()
