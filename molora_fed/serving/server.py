"""Serving a model over HTTP, from opening it to the last answer."""

import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from molora_fed.errors import ConfigError, PortTakenError
from molora_fed.inference.fused_lm import FusedForCausalLM
from molora_fed.serving.addresses import format_server
from molora_fed.serving.api import Api, Limits, is_loopback, load_keys
from molora_fed.serving.batch import RunningBatch
from molora_fed.serving.connections import Doorkeeper, build_server, run_server
from molora_fed.serving.metrics import Metrics
from molora_fed.serving.models import ServedModel, open_served
from molora_fed.serving.scheduler import Scheduler
from molora_fed.storage.compute import Compute
from molora_fed.types import ExpertsPerText

__all__ = ["ApiSettings", "listen", "serve_api"]

_GRACE_SECONDS = 5
"""From the end of the last text to the end of the last answer."""
_SWITCH_SECONDS = 2e-4
"""How long the thread of connections may keep the interpreter from the model's, which gives it up
at every operation and would wait for it hundreds of times a step."""


@dataclass(frozen=True)
class ApiSettings:
    """How a model is served.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        key_file: Keys that may ask, one a line; None lets everybody on this machine.
        insecure: Whether other machines may ask without a key.
        max_texts: Texts that are written at once.
        max_waiting: Generations that wait at once; more are refused.
        max_connections: Open connections at once.
        finish_seconds: How long texts under way may go on after SIGTERM.
        threads: Threads of torch; as it chooses if None.
        experts_per_text: Who goes on with the fused model's texts after a prompt: so many experts,
            or "merged"; all of them if None.
        limits: Of one request.
    """

    host: str = "127.0.0.1"
    port: int = 8_000
    key_file: Path | None = None
    insecure: bool = False
    max_texts: int = 64
    max_waiting: int = 128
    max_connections: int = 512
    finish_seconds: int = 30
    threads: int | None = None
    experts_per_text: ExpertsPerText | None = None
    limits: Limits = field(default_factory=Limits)


def serve_api(
    folder: Path,
    settings: ApiSettings,
    *,
    base_folder: Path | None = None,
    compute: Compute | None = None,
    on_ready: Callable[[str, Sequence[str]], None],
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve until SIGTERM or SIGINT, and finish what runs; a second signal ends at once.

    Args:
        folder: Of any model that `open_model` opens.
        settings: How.
        base_folder: Where its base is, if it is elsewhere than recorded.
        compute: Where to run, and in which dtype.
        on_ready: Told the address and the names that are served, once requests are answered.
        log: Told of each answer, one line without prompt or text.

    Raises:
        ConfigError: If other machines could ask without a key, or keys cannot be read.
        PortTakenError: If the port is in use, or the host is not this machine's.
        MoloraError: Whatever opening the model refuses.
    """
    keys = frozenset() if settings.key_file is None else load_keys(settings.key_file)
    if not keys and not settings.insecure and not is_loopback(settings.host):
        raise ConfigError(
            f"Cannot serve on {settings.host} without keys: expected --key-file, or this machine's "
            "own address, got neither. Give keys, or --insecure to let everybody in."
        )
    with listen(settings.host, settings.port) as listening:
        model = open_served(folder, base_folder=base_folder, compute=compute)
        _run(model, settings, keys, listening, on_ready, log)


def _run(
    model: FusedForCausalLM,
    settings: ApiSettings,
    keys: frozenset[bytes],
    listening: socket.socket,
    on_ready: Callable[[str, Sequence[str]], None],
    log: Callable[[str], None],
) -> None:
    served = ServedModel(model)
    metrics = Metrics(served.experts)
    scheduler = Scheduler(
        RunningBatch(model, experts_per_text=settings.experts_per_text),
        served.copy_tokenizer(),
        ends=served.ends,
        max_texts=settings.max_texts,
        max_waiting=settings.max_waiting,
        threads=settings.threads,
        observer=metrics,
    )
    doorkeeper = Doorkeeper(most=settings.max_connections)
    api = Api(
        served,
        scheduler,
        metrics,
        fingerprint=model.fingerprint,
        limits=settings.limits,
        keys=keys,
        any_host=settings.insecure,
        on_request=doorkeeper.welcome,
        on_stuck=doorkeeper.drop,
        log=log,
    )
    port = listening.getsockname()[1]
    server = build_server(
        api,
        host=settings.host,
        port=port,
        doorkeeper=doorkeeper,
        finish_seconds=settings.finish_seconds + _GRACE_SECONDS,
    )

    def end(number: int, frame: FrameType | None) -> None:
        """Finish what runs at the first signal, end at the second."""
        server.force_exit = server.should_exit
        if not server.should_exit:
            server.should_exit = api.is_closing = True
            last_call = threading.Timer(settings.finish_seconds, scheduler.stop)
            last_call.daemon = True
            last_call.start()

    server.handle_exit = end  # type: ignore[method-assign, assignment]
    scheduler.start()
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        address = f"http://{format_server(settings.host, port)}/v1"
        on_ready(address, tuple(served.gates))
        run_server(server, sockets=[listening])
    finally:
        sys.setswitchinterval(switch_interval)
        api.close()
        scheduler.stop()


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that the port is ours while the model is opened.

    Raises:
        PortTakenError: If the port is in use, or the host is not this machine's.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise PortTakenError(
            f"Cannot serve on port {port}: expected a free port on {host}, got {error.strerror}. "
            "Stop the program that uses it, or choose another with --port."
        ) from error
    return bound
