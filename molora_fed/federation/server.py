"""`molora serve`: keeps the process that carries mail and the coordinator's worker alive."""

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from molora_fed.charter import load_charter
from molora_fed.errors import FederationError, MoloraError
from molora_fed.federation.certificates import ServerCertificate
from molora_fed.federation.fleet import Fleet, connect_fleet
from molora_fed.federation.homes import COORDINATOR_HOME, CoordinatorHome
from molora_fed.federation.logs import EventLog
from molora_fed.federation.mailbox import hold_lock
from molora_fed.federation.members import Members
from molora_fed.federation.metrics import serve_metrics
from molora_fed.federation.overview import describe_contributor, read_server
from molora_fed.federation.status import FederationEvent, OnEvent
from molora_fed.federation.supervise import (
    ProcessGroup,
    Restarts,
    build_flower_environment,
    is_running,
    parse_answer,
    raise_recorded,
    sigterm_as_interrupt,
)
from molora_fed.serving.addresses import (
    DEFAULT_PORT,
    check_loopback,
    check_port_free,
    is_healthy,
)
from molora_fed.storage.compute import Compute
from molora_fed.storage.files import make_home
from molora_fed.storage.values import count_cores

__all__ = ["ServerSupervisor", "serve"]

POLL_SECONDS = 0.3
START_SECONDS = 60.0
STALE_SECONDS = 30.0
FIRST_PULSE_SECONDS = 60.0
CERTIFY_SECONDS = 3_600.0
_ANY_ADDRESS = ("0.0.0.0", "::")
COORDINATOR_MODULE = "molora_fed.federation.coordinator"


def serve(
    cooperative: Path,
    port: int = DEFAULT_PORT,
    on_event: OnEvent = lambda event: None,
    *,
    host: str = "127.0.0.1",
    names: Sequence[str] | None = None,
    threads: int | None = None,
    compute: Compute | None = None,
    metrics_port: int | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Run a cooperative's server until it is told to stop.

    Ctrl-C and SIGTERM (KeyboardInterrupt) end it too; either way no process is left behind, and
    run the same command again to resume.

    Args:
        cooperative: The coordinator's home, made by `molora coop create`.
        port: Port of the server.
        on_event: Receives what changes.
        host: Address to listen on; without `names` a loopback address.
        names: Further names by which members reach it, over TLS and with an invitation; None
            serves whoever is on this machine, without TLS.
        threads: Threads of the coordinator's worker; None takes all cores.
        compute: Where the coordinator's models run; its home's settings where it says nothing.
        metrics_port: Port of the loopback address for health and metrics; None serves none.
        stop: Set it to end.

    Raises:
        ConfigError: If the host is not this machine, and there is no TLS.
        CharterError: If there is no cooperative in the folder.
        PortTakenError: If the port is in use.
        FederationError: If a server already runs on this folder, or its processes keep failing.
        MoloraError: Whatever ended the coordinator's worker.
    """
    stop = stop or threading.Event()
    supervisor = ServerSupervisor(
        cooperative, port, on_event, host=host, names=names, threads=threads, compute=compute
    )
    metrics = serve_metrics(metrics_port, lambda: read_server(supervisor.home))
    with sigterm_as_interrupt(), metrics, supervisor:
        while not stop.wait(POLL_SECONDS):
            supervisor.poll()


class ServerSupervisor:
    """The server's processes; a context manager that leaves none behind.

    Entering starts them, `poll` (about three times a second) watches and reports.

    Args:
        cooperative: The coordinator's home.
        port: Port of the server.
        on_event: Receives what changes.
        host: Address to listen on; without `names` a loopback address.
        names: As for `serve`.
        threads: Threads of the coordinator's worker; None takes all cores.
        compute: Where the coordinator's models run; its home's settings where it says nothing.
        fleet: Which nodes the server has; None takes contributors' own.
    """

    def __init__(
        self,
        cooperative: Path,
        port: int,
        on_event: OnEvent,
        *,
        host: str = "127.0.0.1",
        names: Sequence[str] | None = None,
        threads: int | None = None,
        compute: Compute | None = None,
        fleet: Fleet | None = None,
    ) -> None:
        if names is None:
            check_loopback(host)
        self.home = CoordinatorHome(cooperative)
        self.address = f"{host}:{port}"
        self._host, self._port = host, port
        self._names = None if names is None else _list_names(host, names)
        self._certificate = ServerCertificate(self.home.root)
        self._certified = (0.0, 0.0)
        self._on_event = on_event
        self._threads = threads or count_cores()
        self._compute = compute or Compute()
        self._fleet = fleet or connect_fleet(host, port, names=self._names)
        self._processes = ProcessGroup(self.home.logs, self.home.root / "processes.json")
        self._lock = hold_lock(self.home.root / "serve.lock", what="a server")
        self._restarts = Restarts()
        self._log = EventLog(self.home.logs)
        self._started = 0.0
        self._pulse, self._heard = "", 0.0
        self._phase = ""
        self._shown: dict[str, FederationEvent] = {}
        self._problem = ""

    def __enter__(self) -> "ServerSupervisor":
        """Start everything; what was started ends again if something fails."""
        load_charter(self.home.charter)
        self._lock.__enter__()
        try:
            self._processes.end_leftovers()
            self.home.remove_leftovers()
            check_port_free(self._host, self._port)
            self.home.stop_file.unlink(missing_ok=True)
            self.home.error_file.unlink(missing_ok=True)
            self.home.state_file.unlink(missing_ok=True)
            self.home.board.prepare()
            self.home.pulse.prepare()
            make_home(self.home.root)
            self._certify()
            self._emit(FederationEvent("STARTING", message=f"server on {self.address}"))
            self._start_link()
            self._start_coordinator()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """End everything."""
        self._stop()

    @property
    def phase(self) -> str:
        """Phase of the cooperative as last reported by the coordinator's worker."""
        return self._phase

    def measure_mail_seconds(self) -> float:
        """Processor seconds of the process that carries mail and all it started."""
        return self._processes.measure_seconds("link")

    def poll(self) -> None:
        """Look after the processes once, and report what changed.

        Raises:
            FederationError: If they keep failing.
            MoloraError: Whatever ended the coordinator's worker.
        """
        self._processes.poll()
        self._watch_coordinator()
        self._watch_link()
        if not self._is_certified():
            self._renew()
        self._report()

    def _emit(self, event: FederationEvent) -> None:
        self._log.add(event)
        self._on_event(event)

    def _certify(self) -> None:
        """Make or renew what TLS needs, and the folders of members, if members only are served."""
        self._certified = (time.monotonic(), time.time())
        if self._names is not None:
            self._certificate.prepare(self._names)
            Members(self.home.members).prepare()

    def _is_certified(self) -> bool:
        """Whether that was lately, also by a clock that was set meanwhile, or slept."""
        since, at = self._certified
        passed = max(time.monotonic() - since, abs(time.time() - at))
        return passed <= CERTIFY_SECONDS

    def _renew(self) -> None:
        """`_certify` while serving: the certificate there is stays good for weeks."""
        try:
            self._certify()
        except MoloraError as error:
            self._warn(f"the certificate was not renewed: {error}")

    def _is_healthy(self) -> bool:
        host = "127.0.0.1" if self._host in _ANY_ADDRESS else self._host
        authority = None if self._names is None else self._certificate.authority_file
        return is_healthy(host, self._port, authority)

    def _start_link(self) -> None:
        self.home.pulse.post("")  # what the one before left must not be taken for its own
        own = {COORDINATOR_HOME: str(self.home.root)}
        env = build_flower_environment(self.home.root, **own, **self._fleet.environment)
        # Without its working folder on the path: it may hold somebody's text, or code.
        command = [sys.executable, "-P", "-m", self._fleet.module, str(self.home.root)]
        self._processes.start("link", [*command, *self._fleet.options], env)
        self._started = time.monotonic()
        deadline = self._started + START_SECONDS
        while self._fleet.is_served and not self._is_healthy():
            code = self._processes.exit_code("link")
            if code is not None or time.monotonic() > deadline:
                raise FederationError(
                    f"Cannot start the server on {self.address}: expected an answer, "
                    f"got {'none' if code is None else f'exit status {code}'}. "
                    f"See {self._processes.log('link')}."
                )
            time.sleep(0.1)

    def _start_coordinator(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": str(self._threads), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", COORDINATOR_MODULE, str(self.home.root)]
        command.append(self._compute.model_dump_json())
        self._processes.start("coordinator", command, env)

    def _watch_coordinator(self) -> None:
        code = self._processes.exit_code("coordinator")
        if code is None:
            return
        log = self._processes.log("coordinator")
        if code > 0:
            raise_recorded(
                self.home.error_file,
                code=code,
                otherwise=f"Cannot go on: expected the coordinator's worker to run, got exit "
                f"status {code}. See {log}.",
            )
        self._restarts.note("the coordinator's worker", log)
        self._warn(f"the coordinator's worker ended with {code}; started again")
        self._start_coordinator()

    def _watch_link(self) -> None:
        """Restart the process that carries mail when it died, or carries none any more."""
        code = self._processes.exit_code("link")
        now = time.monotonic()
        if (pulse := self.home.pulse.read()) != self._pulse:
            self._pulse, self._heard = pulse, now  # not the time it says: clocks are set
        age, silent = now - self._started, now - max(self._heard, self._started)
        if code is not None or (age > FIRST_PULSE_SECONDS and silent > STALE_SECONDS):
            self._restarts.note("the server's mail", self._processes.log("link"))
            self._warn("the process that carries mail ended; started again")
            self._processes.stop("link", grace_seconds=2.0)
            self._renew()
            self._start_link()

    def _warn(self, message: str) -> None:
        self._emit(FederationEvent(self._phase or "STARTING", message=message, problem=True))

    def _report(self) -> None:
        """Emit an event for whatever changed in the coordinator's state and the mailboxes."""
        problem = self.home.board.read() or self.home.worker_board.read()
        if problem != self._problem:
            self._problem = problem
            recovered = "the disk takes data again; going on"
            self._emit(
                FederationEvent(self._phase, message=problem or recovered, problem=bool(problem))
            )
        state = self.home.read_state()
        self._phase = state.get("phase", self._phase)
        events = {"": FederationEvent(**state)} if state else {}
        # By key, not by name: two may have said the same one.
        events |= {one.fingerprint: describe_contributor(one) for one in self.home.contributors()}
        for key, event in events.items():
            if self._shown.get(key) != event:
                self._shown[key] = event
                self._emit(event)

    def _stop(self) -> None:
        """Ask for the end of mail, then end every process."""
        try:
            self.home.mail.mkdir(parents=True, exist_ok=True)
            self.home.stop_file.touch()
            self._wait_for_carrier()
        except OSError:
            pass  # on a full disk it is ended by signal like the rest
        try:
            self._processes.stop_all()
        finally:
            self._lock.__exit__(None, None, None)
            self._emit(FederationEvent("STOPPED", message="server stopped"))

    def _wait_for_carrier(self) -> None:
        """Let the process that was asked to end do so by itself, for a while."""
        carrier = parse_answer(self.home.pulse.read()).get("pid")
        deadline = time.monotonic() + self._fleet.farewell_seconds
        while carrier is not None and is_running(int(carrier)) and time.monotonic() < deadline:
            time.sleep(0.1)


def _list_names(host: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names of a server's certificate: those asked for, and those of this machine."""
    own = () if host in _ANY_ADDRESS else (host,)
    return tuple(dict.fromkeys((*names, *own, "127.0.0.1", "localhost")))
