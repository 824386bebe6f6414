"""What the API counts, in the text format of Prometheus."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from torch import Tensor, stack

from molora_fed.serving.scheduler import Observer

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/healthz", "/metrics")


class Metrics(Observer):
    """Counters of one server; what clients write is no label, so that their number is bounded."""

    def __init__(self, experts: Sequence[str]) -> None:
        """Begin to count.

        Args:
            experts: Names of the gates.
        """
        self._registry = registry = CollectorRegistry()
        self._experts = tuple(experts)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, registry=registry, buckets=_SECONDS)

        self._requests = Counter(
            "molora_api_requests",
            "Answers by path and status",
            ("path", "status"),
            registry=registry,
        )
        self._tokens = Counter(
            "molora_api_tokens", "Tokens read and written", ("kind",), registry=registry
        )
        self._gates = Counter(
            "molora_api_gates", "Sum of gates over written tokens", ("expert",), registry=registry
        )
        self._waiting = Gauge("molora_api_waiting", "Generations that wait", registry=registry)
        self._running = Gauge("molora_api_running", "Texts being written", registry=registry)
        self._answering = histogram("molora_api_request_seconds", "From head to end of an answer")
        self._first = histogram("molora_api_prompt_seconds", "From queue to a prompt's end")
        self._steps = histogram("molora_api_step_seconds", "One token of every running text")

    def on_answer(self, path: str, status: int, seconds: float) -> None:
        """A request was answered, or its client went (status 499)."""
        known = path if path in _PATHS else "other"
        self._requests.labels(known, str(status)).inc()
        self._answering.observe(seconds)

    def on_change(self, *, waiting: int, running: int) -> None:
        """See `Observer`."""
        self._waiting.set(waiting)
        self._running.set(running)

    def on_prompt(self, num_tokens: int, waited_seconds: float) -> None:
        """See `Observer`."""
        self._tokens.labels("prompt").inc(num_tokens)
        self._first.observe(waited_seconds)

    def on_step(self, seconds: float, gates: Sequence[Tensor]) -> None:
        """See `Observer`."""
        self._steps.observe(seconds)
        self._tokens.labels("completion").inc(len(gates))
        sums = stack(list(gates)).sum(0).tolist() if gates else []
        for name, total in zip(self._experts, sums, strict=bool(sums)):
            self._gates.labels(name).inc(max(total, 0.0))

    def as_text(self) -> bytes:
        """Everything counted so far."""
        return bytes(generate_latest(self._registry))
