"""`molora join`: keeps a contributor's worker and node alive until its result is there."""

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from molora_fed.charter import Charter, load_charter
from molora_fed.errors import CharterError, FederationError, ServerUnreachableError
from molora_fed.federation.consent import (
    give_consent,
    has_consent,
)
from molora_fed.federation.fleet import NOT_A_MEMBER, WRONG_CLOCK
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.join_settings import JoinSettings, prepare_home
from molora_fed.federation.logs import EventLog
from molora_fed.federation.mailbox import hold_lock
from molora_fed.federation.metrics import serve_metrics
from molora_fed.federation.overview import read_contributor
from molora_fed.federation.status import FederationEvent, OnEvent
from molora_fed.federation.supervise import (
    ProcessGroup,
    build_flower_environment,
    raise_recorded,
    sigterm_as_interrupt,
)
from molora_fed.federation.worker_mail import (
    is_described,
)
from molora_fed.serving.addresses import (
    check_loopback,
    find_trouble,
    format_server,
    parse_server,
)

__all__ = ["ContributorSupervisor", "join"]

POLL_SECONDS = 0.3
HEALTH_SECONDS = 2.0
LINGER_SECONDS = 2.0
MAX_RESTARTS = 5
CLOCK_SECONDS = 5.0
FAREWELL_SECONDS = 10.0
"""How long a worker's error waits for the server's last question to be answered."""
WORKER_MODULE = "molora_fed.federation.worker"
NODE_MODULE = "molora_fed.federation.flower.node"

Consent = Callable[[Charter], bool]
"""Shows what a charter asks for and says whether it may be sent."""


def join(
    server: str,
    settings: JoinSettings,
    home: Path,
    on_event: OnEvent = lambda event: None,
    *,
    consent: Consent,
    authority: Path | None = None,
    wait_seconds: float = 15.0,
    metrics_port: int | None = None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Take part in a cooperative until the fused model is there, or it is told to stop.

    Ctrl-C and SIGTERM (KeyboardInterrupt) end it too; either way no process is left behind, and
    run the same command again to resume.

    Args:
        server: "HOST:PORT" of the cooperative's server.
        settings: What to join with.
        home: Folder for the key, the training and the result.
        on_event: Receives what changes.
        consent: Asked once the charter is here (and the base's config, which decides how many sums
            there are), and again if it asks for other samples or more sums: whether what it asks
            for may be sent. Nothing of text or adapter leaves before.
        authority: Certificate of the authority that vouches for the server, PEM, as an accepted
            invitation left it; None speaks without TLS, on this machine only.
        wait_seconds: How long to wait for a server that does not answer at first.
        metrics_port: Port of the loopback address for health and metrics; None serves none.
        stop: Set it to end early.

    Returns:
        The acknowledgement: `state` and `contribution_id` as the coordinator's ledger has them.

    Raises:
        ConfigError: If a server without TLS is not on this machine, or a setting is wrong; a
            CorpusError if there is no text, an UnknownNameError if there is no such domain.
        ServerUnreachableError: If no server answers.
        AdmissionError: If the contribution was not admitted.
        FederationError: If consent or this contributor was refused, or its processes keep failing.
        MoloraError: Whatever ended the worker.
    """
    stop = stop or threading.Event()
    supervisor = ContributorSupervisor(
        server,
        home,
        settings,
        on_event,
        authority=authority,
        wait_seconds=wait_seconds,
        consent=consent,
    )
    metrics = serve_metrics(metrics_port, lambda: read_contributor(supervisor.home))
    with sigterm_as_interrupt(), metrics, supervisor:
        while not supervisor.is_finished and not stop.wait(POLL_SECONDS):
            supervisor.poll()
    return supervisor.acknowledgement


class ContributorSupervisor:
    """A contributor's processes; a context manager that leaves none behind.

    Entering starts them, `poll` (about three times a second) watches and reports, until
    `is_finished`.
    """

    def __init__(
        self,
        server: str,
        home: Path,
        settings: JoinSettings,
        on_event: OnEvent,
        *,
        consent: Consent,
        authority: Path | None = None,
        wait_seconds: float = 15.0,
    ) -> None:
        self._host, self._port = parse_server(server)
        if authority is None:
            check_loopback(self._host)
        self._authority = authority
        self.home = ContributorHome(home)
        self.settings = settings
        self.is_finished = False
        self._on_event = on_event
        self._wait_seconds = wait_seconds
        self._consent = consent
        self._agreed: Charter | None = None
        self._processes = ProcessGroup(self.home.logs, self.home.root / "processes.json")
        self._lock = hold_lock(self.home.root / "join.lock", what="a contributor")
        self._log = EventLog(self.home.logs)
        self._worker_restarts = 0
        self._node_restarts = 0
        self._node_started = 0.0
        self._last_health = 0.0
        self._server_gone = False
        self._clock_is_wrong = False
        self._worker_done = False
        self._worker_ended = 0.0
        self._quiet_since = 0.0
        self._shown: FederationEvent | None = None
        self._problem = ""
        self._warned: set[str] = set()

    @property
    def acknowledgement(self) -> dict[str, Any]:
        """What the coordinator acknowledged; empty before it did."""
        letter = self.home.read_acknowledgement()
        return {} if letter is None else letter.to_json()

    def __enter__(self) -> "ContributorSupervisor":
        """Start everything; what was started ends again if something fails."""
        self._lock.__enter__()
        try:
            self._processes.end_leftovers()
            self.home.remove_leftovers()
            self.settings = prepare_home(self.home, self.settings)
            self._wait_for_server()
            self._start_worker()
            self._start_node()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """End everything."""
        self._stop()

    def _wait_for_server(self) -> None:
        """Wait until the server answers.

        Raises:
            ServerUnreachableError: If it does not in time.
        """
        deadline = time.monotonic() + self._wait_seconds
        while trouble := find_trouble(self._host, self._port, self._authority):
            if time.monotonic() >= deadline:
                raise ServerUnreachableError(
                    f"Cannot join at {self._host}:{self._port}: expected a server, got {trouble} "
                    f"for {self._wait_seconds:.0f} s. Check the address, or start it with "
                    "`molora serve`."
                )
            time.sleep(0.3)

    def _start_worker(self) -> None:
        env = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.settings.threads),
            "PYTHONUNBUFFERED": "1",
        }
        command = [sys.executable, "-m", WORKER_MODULE, str(self.home.root)]
        self._processes.start("worker", command, env)

    def _start_node(self) -> None:
        self.home.busy.post("")
        env = build_flower_environment(self.home.root)
        command = [
            sys.executable, "-P", "-m", NODE_MODULE, str(self.home.root),
            format_server(self._host, self._port), str(self.home.node_key),
        ]  # fmt: skip
        if self._authority is not None:
            command += ["--authority", str(self._authority)]
        self._processes.start("node", command, env)
        self._node_started = time.monotonic()

    def poll(self) -> None:
        """Look after the processes once, and report what changed.

        Raises:
            FederationError: If this contributor was refused, or processes keep failing.
            MoloraError: Whatever ended the worker.
        """
        self._processes.poll()
        self._report()
        self.home.check_refusal()
        self._settle_consent()
        if not self._worker_done:
            self._watch_worker()
        elif self._is_quiet() or self._has_failed():
            self._finish()
        self._watch_node()

    def _settle_consent(self) -> None:
        """Ask whether what the charter asks for may be sent; the worker waits for it.

        Raises:
            FederationError: If it may not.
        """
        try:
            charter = load_charter(self.home.charter)
        except CharterError:
            return  # not here yet, or just being replaced
        if charter == self._agreed:
            return
        if not has_consent(self.home, charter):
            if not is_described(self.home):
                return
            if not self._consent(charter):
                raise FederationError(
                    f"Cannot join cooperative '{charter.identity.name}': expected consent to send "
                    "what it asks for, got none. Nothing of your text or adapter was sent."
                )
            give_consent(self.home, charter)
        self._agreed = charter

    def _watch_worker(self) -> None:
        code = self._processes.exit_code("worker")
        if code is None:
            return
        if code >= 0:
            self._worker_done = True  # well or not, the server's last question is still answered
            self._worker_ended = time.monotonic()
            return
        self._worker_restarts += 1
        log = self._processes.log("worker")
        if self._worker_restarts > MAX_RESTARTS:
            raise FederationError(
                f"Cannot keep the worker running: expected it to stay up, got signal {-code} "
                f"{self._worker_restarts} times. See {log}."
            )
        self._warn(f"the worker was ended by signal {-code}; started again, it resumes")
        self._start_worker()

    def _is_quiet(self) -> bool:
        """Whether the last answer has left: none is being made or sent for a while."""
        busy = self._server_gone or self._clock_is_wrong or self.home.busy.read() != ""
        now = time.monotonic()
        if busy or not self._quiet_since:
            self._quiet_since = now
        return now - self._quiet_since >= LINGER_SECONDS

    def _has_failed(self) -> bool:
        """Whether the worker failed a while ago: answers may never pause, or the server be away."""
        is_late = time.monotonic() - self._worker_ended >= FAREWELL_SECONDS
        return is_late and bool(self._processes.exit_code("worker"))

    def _finish(self) -> None:
        code = self._processes.exit_code("worker")
        if code:
            raise_recorded(
                self.home.error_file,
                code=code,
                otherwise=f"Cannot go on: expected the worker to end well, got exit status "
                f"{code}. See {self._processes.log('worker')}.",
            )
        self.is_finished = True

    def _watch_node(self) -> None:
        """Restart the node when it died, and say whether the server answers."""
        now = time.monotonic()
        if now - self._last_health >= HEALTH_SECONDS:
            self._last_health = now
            trouble = find_trouble(self._host, self._port, self._authority, timeout_seconds=5.0)
            if trouble and not self._server_gone:
                self._server_gone = True
                how = "" if trouble == "no answer" else f" as it should, but with {trouble}"
                self._warn(f"the server does not answer{how}; work goes on, waiting for it")
            elif self._server_gone and not trouble:
                self._server_gone = False
                self._emit_message("the server is back")
        code = self._processes.exit_code("node")
        if code is None:
            if now - self._node_started > 60:
                self._node_restarts = 0
            if self._clock_is_wrong and now - self._node_started > 2 * CLOCK_SECONDS:
                self._clock_is_wrong = False
                self._emit_message("the clocks agree again; going on")
            return
        if code == WRONG_CLOCK:
            self._wait_for_clock(now)
            return
        if code == NOT_A_MEMBER:
            raise FederationError(
                f"Cannot stay connected as '{self.settings.name}': expected to be a member, got "
                "refused by the server. Ask the coordinator for a new invitation."
            )
        self._node_restarts += 1
        if self._node_restarts > MAX_RESTARTS and not self._server_gone:
            raise FederationError(
                f"Cannot stay connected: expected the node to stay up, got {self._node_restarts} "
                f"failures. See {self._processes.log('node')}."
            )
        if now - self._node_started > 2 * self._node_restarts:
            self._processes.stop("node", grace_seconds=4.0)
            self._start_node()

    def _wait_for_clock(self, now: float) -> None:
        """Start the node again and again until its server takes the time it signs."""
        if not self._clock_is_wrong:
            self._clock_is_wrong = True
            self._warn(
                "this machine's clock and the server's differ by minutes; set the one that is "
                "wrong, work goes on and waits for it"
            )
        if now - self._node_started > CLOCK_SECONDS:
            self._processes.stop("node", grace_seconds=4.0)
            self._start_node()

    def _emit(self, event: FederationEvent) -> None:
        own = replace(event, contributor=self.settings.name, seen_by="contributor")
        self._log.add(own)
        self._on_event(own)

    def _emit_message(self, message: str) -> None:
        phase = self.home.read_state().get("phase", "JOINING")
        self._emit(FederationEvent(phase, message=message))

    def _warn(self, message: str) -> None:
        phase = self.home.read_state().get("phase", "JOINING")
        self._emit(FederationEvent(phase, message=message, problem=True))

    def _report(self) -> None:
        problem = self.home.board.read()
        if problem != self._problem:
            self._problem = problem
            if problem:
                self._warn(problem)
            else:
                self._emit_message("the disk takes data again; going on")
        state = self.home.read_state()
        if not state:
            return
        for text in (*self.home.read_warnings(), *self.home.read_refusals()):
            if text not in self._warned:
                self._warned.add(text)
                self._warn(text)
        ledger_state = str(self.acknowledgement.get("state", ""))
        event = FederationEvent(**state, state=ledger_state)
        if event != self._shown:
            self._shown = event
            self._emit(event)

    def _stop(self) -> None:
        try:
            self._processes.stop_all()
        finally:
            self._lock.__exit__(None, None, None)
            self._emit(FederationEvent("STOPPED", message="contributor stopped"))
