"""Health and metrics of a server or a contributor, on this machine's loopback address only.

`GET /healthz` answers 200 if work goes on and 503 with the reasons if not; `GET /metrics` is in the
text format of Prometheus. Both are read from the home's files at each request, so that nothing is
measured where work is done. Names of members are labels: other users of this machine can read them.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric

from molora_fed.errors import MoloraError
from molora_fed.federation.overview import ContributorOverview, MemberRow, ServerOverview
from molora_fed.serving.addresses import check_port_free
from molora_fed.storage.untrusted import clean

__all__ = ["serve_metrics"]

HOST = "127.0.0.1"
MAX_MEMBERS = 1_000
"""Members that have rows of their own, the most recently heard of."""
REQUEST_SECONDS = 10.0
_LABELS = ("name", "domain", "standing", "key")
_NAMES = ("127.0.0.1", "localhost")
_TEXT = "text/plain; version=0.0.4; charset=utf-8"

Overview = ServerOverview | ContributorOverview


@contextmanager
def serve_metrics(port: int | None, read: Callable[[], Overview]) -> Iterator[None]:
    """Answer on a port of the loopback address for the block; None does nothing.

    Args:
        port: The port.
        read: Looks into the home.

    Raises:
        PortTakenError: If somebody else uses it.
    """
    if port is None:
        yield
        return
    check_port_free(HOST, port, option="--metrics-port")
    server = make_server(
        HOST, port, lambda environ, start: _answer(read, environ, start), _Server, _Handler
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal is the supervisor's."""


def _answer(
    read: Callable[[], Overview], environ: dict[str, Any], start: Callable[..., Any]
) -> Iterable[bytes]:
    status, kind, body = _build_answer(read, environ)
    start(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
    return [body]


def _build_answer(read: Callable[[], Overview], environ: dict[str, Any]) -> tuple[str, str, bytes]:
    host = str(environ.get("HTTP_HOST", "")).rpartition(":")[0] or environ.get("HTTP_HOST", "")
    if host not in _NAMES:  # a page of another site, under a name of its own
        return "421 Misdirected Request", "text/plain", b"Not served under this name\n"
    path = environ.get("PATH_INFO")
    if environ.get("REQUEST_METHOD") != "GET" or path not in ("/healthz", "/metrics"):
        return "404 Not Found", "text/plain", b"Served are /healthz and /metrics\n"
    try:
        overview = read()
    except (MoloraError, OSError) as error:
        body = json.dumps({"status": "failing", "problems": [clean(error, 500)]})
        return "503 Service Unavailable", "application/json", body.encode() + b"\n"
    if path == "/metrics":
        return "200 OK", _TEXT, _format_metrics(overview)
    problems = list(overview.problems)
    body = json.dumps(
        {
            "status": "failing" if problems else "ok",
            "phase": overview.state.phase,
            "problems": problems,
            "waiting_for": overview.list_awaited(),
        }
    )
    status = "503 Service Unavailable" if problems else "200 OK"
    return status, "application/json", body.encode() + b"\n"


def _format_metrics(overview: Overview) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(overview))
    return bytes(generate_latest(registry))


class _Collector:
    """The metrics of one look."""

    def __init__(self, overview: Overview) -> None:
        self._overview = overview

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        overview = self._overview
        yield _gauge("up", "1 while all of it does its work", 0.0 if overview.problems else 1.0)
        yield _gauge("disk_free_bytes", "Free space of the home's disk", overview.free_bytes)
        yield _gauge("work_step", "Steps done of the current work", overview.state.step or 0)
        yield _gauge("work_steps", "Steps of the current work in all", overview.state.total or 0)
        if isinstance(overview, ServerOverview):
            yield from self._collect_server(overview)
        else:
            yield from self._collect_contributor(overview)

    def _collect_server(self, overview: ServerOverview) -> Iterator[Metric]:
        labels = {
            "name": overview.name,
            "identity": overview.identity,
            "phase": overview.state.phase,
        }
        yield InfoMetricFamily("molora_cooperative", "The cooperative and its phase", labels)
        yield _gauge("amendment", "Number of the amendment that counts", overview.amendment)
        yield _gauge("nodes", "Contributors' nodes that are connected", overview.nodes)
        now = time.time() if overview.is_running else math.inf  # then nobody is connected
        rows = sorted(overview.members, key=lambda row: -row.seen.last)[:MAX_MEMBERS]
        yield _count_by("contributions", "Contributions by state in the ledger", "state", rows)
        yield from _per_member(rows, now)

    def _collect_contributor(self, overview: ContributorOverview) -> Iterator[Metric]:
        labels = {
            "name": overview.name,
            "domain": overview.domain,
            "cooperative": overview.cooperative,
            "phase": overview.state.phase,
            "state": overview.state.state,
        }
        yield InfoMetricFamily("molora_contributor", "The contributor and its phase", labels)
        if overview.state.loss is not None:
            yield _gauge("loss", "Last loss, nats per token", overview.state.loss)
        seen = overview.seen
        yield _gauge("received_bytes", "Bytes of files from the server", seen.received)
        yield _gauge("sent_bytes", "Bytes of files to the server", seen.sent)
        yield _gauge("server_seen_seconds", "When the server was last heard of", seen.last)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"molora_{name}", text, value=float(value))


def _count_by(name: str, text: str, label: str, rows: Iterable[MemberRow]) -> Metric:
    counts: dict[str, int] = {}
    for row in rows:
        state = "" if row.event is None else row.event.state
        counts[state or "NONE"] = counts.get(state or "NONE", 0) + 1
    family = GaugeMetricFamily(f"molora_{name}", text, labels=[label])
    for state, count in sorted(counts.items()):
        family.add_metric([state], count)
    return family


def _per_member(rows: Iterable[MemberRow], now: float) -> Iterator[Metric]:
    families = {
        name: GaugeMetricFamily(f"molora_member_{name}", text, labels=list(_LABELS))
        for name, text in (
            ("connected", "1 if it was heard of within the last minute and a half"),
            ("seen_seconds", "When it was last heard of, seconds since 1970"),
            ("received_bytes", "Bytes of files it sent"),
            ("sent_bytes", "Bytes of files it was sent"),
        )
    }
    for row in rows:
        labels = [row.name, row.domain, row.standing, row.key[:16]]
        families["connected"].add_metric(labels, float(row.is_connected(now)))
        families["seen_seconds"].add_metric(labels, row.seen.last)
        families["received_bytes"].add_metric(labels, row.seen.received)
        families["sent_bytes"].add_metric(labels, row.seen.sent)
    yield from families.values()
