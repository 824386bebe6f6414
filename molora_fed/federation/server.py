"""`molora serve`: keeps the SuperLink, the mail-carrying run and the coordinator's worker alive."""

import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import tomli_w

from molora_fed.charter import load_charter
from molora_fed.errors import FederationError
from molora_fed.federation.envelopes import read_letter
from molora_fed.federation.fleet import CONNECTED, Fleet
from molora_fed.federation.homes import COORDINATOR_HOME, ContributorMailbox, CoordinatorHome
from molora_fed.federation.kept import Offer
from molora_fed.federation.letters import Acknowledgement, Refusal, ShownState
from molora_fed.federation.mailbox import hold_lock
from molora_fed.federation.status import FederationEvent, OnEvent
from molora_fed.federation.supervise import (
    DEFAULT_PORT,
    ProcessGroup,
    Restarts,
    build_flower_environment,
    check_loopback,
    check_port_free,
    is_healthy,
    is_running,
    parse_answer,
    raise_recorded,
    run_command,
    sigterm_as_interrupt,
)
from molora_fed.storage.files import write_bytes
from molora_fed.storage.untrusted import clean
from molora_fed.storage.values import count_cores

__all__ = ["ServerSupervisor", "serve"]

POLL_SECONDS = 0.3
START_SECONDS = 60.0
STALE_SECONDS = 30.0
FIRST_PULSE_SECONDS = 60.0
COORDINATOR_MODULE = "molora_fed.federation.coordinator"
_FLOWER_PROJECT = {
    "project": {
        "name": "molora-fed",
        "version": "0.1.0",
        "description": "Mailboxes of molora-fed; the code is the installed package.",
        "license": "Apache-2.0",
        "dependencies": [],
    },
    "tool": {
        "flwr": {
            "app": {
                "publisher": "molora",
                "components": {
                    "serverapp": "molora_fed.federation.server_app:app",
                    "clientapp": "molora_fed.federation.client_app:app",
                },
            }
        }
    },
}
"""The Flower app holds no code, only where the installed code is."""


def serve(
    cooperative: Path,
    port: int = DEFAULT_PORT,
    on_event: OnEvent = lambda event: None,
    *,
    host: str = "127.0.0.1",
    threads: int | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Run a cooperative's server until it is told to stop.

    Ctrl-C and SIGTERM (KeyboardInterrupt) end it too; either way no process is left behind, and
    run the same command again to resume.

    Args:
        cooperative: The coordinator's home, made by `molora coop create`.
        port: Port of the server.
        on_event: Receives what changes.
        host: Loopback address to listen on.
        threads: Threads of the coordinator's worker; None takes all cores.
        stop: Set it to end.

    Raises:
        ConfigError: If the host is not this machine.
        CharterError: If there is no cooperative in the folder.
        PortTakenError: If the port is in use.
        FederationError: If a server already runs on this folder, or its processes keep failing.
        MoloraError: Whatever ended the coordinator's worker.
    """
    stop = stop or threading.Event()
    supervisor = ServerSupervisor(cooperative, port, on_event, host=host, threads=threads)
    with sigterm_as_interrupt(), supervisor:
        while not stop.wait(POLL_SECONDS):
            supervisor.poll()


class ServerSupervisor:
    """The server's processes; a context manager that leaves none behind.

    Entering starts them, `poll` (about three times a second) watches and reports.

    Args:
        cooperative: The coordinator's home.
        port: Port of the server.
        on_event: Receives what changes.
        host: Loopback address to listen on.
        threads: Threads of the coordinator's worker; None takes all cores.
        fleet: Which nodes the SuperLink has.
    """

    def __init__(
        self,
        cooperative: Path,
        port: int,
        on_event: OnEvent,
        *,
        host: str = "127.0.0.1",
        threads: int | None = None,
        fleet: Fleet = CONNECTED,
    ) -> None:
        check_loopback(host)
        self.home = CoordinatorHome(cooperative)
        self.address = f"{host}:{port}"
        self._host, self._port = host, port
        self._on_event = on_event
        self._threads = threads or count_cores()
        self._fleet = fleet
        self._processes = ProcessGroup(self.home.logs, self.home.root / "processes.json")
        self._lock = hold_lock(self.home.root / "serve.lock", what="a server")
        self._restarts = Restarts()
        self._submitted = 0.0
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
            self._emit(FederationEvent("STARTING", message=f"server on {self.address}"))
            self._start_superlink()
            self._start_coordinator()
            self._submit_run()
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
        """Processor seconds of the SuperLink and all it started, the carriers of letters."""
        return self._processes.measure_seconds("superlink")

    def poll(self) -> None:
        """Look after the processes once, and report what changed.

        Raises:
            FederationError: If they keep failing.
            MoloraError: Whatever ended the coordinator's worker.
        """
        self._processes.poll()
        self._watch_coordinator()
        self._watch_flower()
        self._report()

    def _emit(self, event: FederationEvent) -> None:
        self._on_event(event)

    def _start_superlink(self) -> None:
        own = {COORDINATOR_HOME: str(self.home.root)}
        env = build_flower_environment(self.home.root, **own, **self._fleet.environment)
        # In memory: Flower's tables are transport, not truth, and SQLite locks under large parts.
        command = [
            "flower-superlink", "--insecure", "--host", self._host, "--port", str(self._port),
            "--disable-runtime-dependency-installation", *self._fleet.superlink_options,
        ]  # fmt: skip
        self._processes.start("superlink", command, env)
        deadline = time.monotonic() + START_SECONDS
        while not is_healthy(self._host, self._port):
            code = self._processes.exit_code("superlink")
            if code is not None or time.monotonic() > deadline:
                raise FederationError(
                    f"Cannot start the server on {self.address}: expected a healthy SuperLink, "
                    f"got {'no answer' if code is None else f'exit status {code}'}. "
                    f"See {self._processes.log('superlink')}."
                )
            time.sleep(0.1)

    def _start_coordinator(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": str(self._threads), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", COORDINATOR_MODULE, str(self.home.root)]
        self._processes.start("coordinator", command, env)

    def _submit_run(self) -> None:
        """Start the mail-carrying run."""
        self.home.pulse.post("")  # what the one before left must not be taken for its own
        _submit_run(self.home, self.address, self._fleet)
        self._submitted = time.monotonic()

    def _watch_coordinator(self) -> None:
        code = self._processes.exit_code("coordinator")
        if code is None:
            return
        log = self._processes.log("coordinator")
        if code > 0:
            raise_recorded(
                self.home.error_file,
                otherwise=f"Cannot go on: expected the coordinator's worker to run, got exit "
                f"status {code}. See {log}.",
            )
        self._restarts.note("the coordinator's worker", log)
        self._warn(f"the coordinator's worker ended with {code}; started again")
        self._start_coordinator()

    def _watch_flower(self) -> None:
        """Restart the SuperLink or the run when they died.

        Without its `flower-superexec` a SuperLink looks healthy and never starts a run again.
        """
        code = self._processes.exit_code("superlink")
        if code is not None or not self._processes.has_descendant("superlink", "flower-superexec"):
            self._restarts.note("the SuperLink", self._processes.log("superlink"))
            self._warn("the SuperLink ended; started again")
            self._processes.stop("superlink", grace_seconds=2.0)
            self._start_superlink()
            self._submit_run()
            return
        age = time.monotonic() - self._submitted
        pulse = parse_answer(self.home.pulse.read())
        silent = time.time() - pulse["time"] if "time" in pulse else age
        is_gone = "pid" in pulse and not is_running(int(pulse["pid"]))
        if is_gone or (age > FIRST_PULSE_SECONDS and silent > STALE_SECONDS):
            self._restarts.note("the mail-carrying run", self._processes.log("superlink"))
            self._warn("the mail-carrying run ended; submitted again")
            self._submit_run()

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
        events |= {one.fingerprint: _describe(one) for one in self.home.contributors()}
        for key, event in events.items():
            if self._shown.get(key) != event:
                self._shown[key] = event
                self._emit(event)

    def _stop(self) -> None:
        """Ask the run to end, then end every process."""
        try:
            self.home.mail.mkdir(parents=True, exist_ok=True)
            self.home.stop_file.touch()
            self._wait_for_carrier()
        except OSError:
            pass  # on a full disk the run is ended by signal like the rest
        try:
            self._processes.stop_all()
        finally:
            self._lock.__exit__(None, None, None)
            self._emit(FederationEvent("STOPPED", message="server stopped"))

    def _wait_for_carrier(self) -> None:
        """Let the run that was asked to end do so by itself, for a while."""
        carrier = parse_answer(self.home.pulse.read()).get("pid")
        deadline = time.monotonic() + self._fleet.farewell_seconds
        while carrier is not None and is_running(int(carrier)) and time.monotonic() < deadline:
            time.sleep(0.1)


def _submit_run(home: CoordinatorHome, address: str, fleet: Fleet) -> None:
    """Start the mail-carrying run on a SuperLink.

    Args:
        home: The coordinator's home; the app's folder and Flower's settings are made below it.
        address: "HOST:PORT" of the SuperLink.
        fleet: Which nodes it has.

    Raises:
        FederationError: If Flower refuses it.
        StorageError: On I/O errors.
    """
    flower = home.root / "flower"
    write_bytes(flower / "app" / "pyproject.toml", tomli_w.dumps(_FLOWER_PROJECT).encode())
    connection = {"default": "local", "local": {"address": address, "insecure": True}}
    write_bytes(flower / "config.toml", tomli_w.dumps({"superlink": connection}).encode())
    log = home.logs / "run.log"
    command = ["flwr", "run", str(flower / "app"), "local", "--format", "json", *fleet.run_options]
    env = build_flower_environment(home.root, **fleet.environment)
    answer = parse_answer(run_command(command, env=env, log=log))
    # The exit status is 0 even on failure.
    if answer.get("success") is not True:
        raise FederationError(
            "Cannot start the mail-carrying run: expected success, got "
            f"{str(answer.get('error-message', 'no answer'))[:200]}. See {log}."
        )


def _describe(mailbox: ContributorMailbox) -> FederationEvent:
    """One contributor as the server sees it; what cannot be shown is said, and ends nothing."""
    try:
        return _describe_letters(mailbox)
    except Exception as error:  # whoever goes on with the letter sets it aside
        return FederationEvent(
            "JOINING", contributor=mailbox.name, message=clean(error, 500), problem=True
        )


def _describe_letters(mailbox: ContributorMailbox) -> FederationEvent:
    state = read_letter(mailbox.state_file, ShownState) or ShownState()
    refusal = read_letter(mailbox.refusal_file, Refusal)
    fault = read_letter(mailbox.fault_file, Refusal)
    offer = read_letter(mailbox.offer_file, Offer)
    ledger_state = ""
    if offer is not None:
        path = mailbox.acknowledgement_file(offer.id)
        acknowledgement = read_letter(path, Acknowledgement)
        ledger_state = "" if acknowledgement is None else acknowledgement.state
    event = FederationEvent(
        **{
            **state.known,
            "phase": "DONE" if mailbox.delivered_file.exists() else state.phase,
            "contributor": mailbox.name,
            "state": ledger_state,
        }
    )
    for bad_news in (state.problem, refusal and refusal.reason, fault and fault.reason):
        if bad_news:
            return replace(event, message=bad_news, problem=True)
    return event
