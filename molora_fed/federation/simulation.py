"""A federation of many contributors on one machine, its nodes simulated by Flower.

The mailboxes, letters and workers are those of `serve` and `join`; what differs is that Ray
answers the letters of all contributors, by partition id, and that a pool of workers, one a core,
does their work, instead of a node and a worker for everyone.
"""

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molora_fed.charter import load_charter
from molora_fed.errors import CharterError, ConfigError, FederationError
from molora_fed.federation.consent import (
    give_consent,
    has_consent,
)
from molora_fed.federation.fleet import simulate_fleet, write_partitions
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.join_settings import JoinSettings, prepare_home
from molora_fed.federation.local import HOST, LocalContributor
from molora_fed.federation.mailbox import hold_lock, read_json
from molora_fed.federation.server import ServerSupervisor
from molora_fed.federation.status import FederationEvent, OnEvent
from molora_fed.federation.supervise import (
    ProcessGroup,
    Restarts,
    raise_recorded,
    sigterm_as_interrupt,
)
from molora_fed.serving.addresses import find_free_port
from molora_fed.storage.compute import Compute
from molora_fed.storage.files import write_json
from molora_fed.storage.values import count_cores

__all__ = ["SimulationOutcome", "SimulationSupervisor", "run_simulated"]

POLL_SECONDS = 0.3
ACTORS = 2
_SCRATCH_PREFIX = "molora-"
POOL_MODULE = "molora_fed.federation.pool_worker"


@dataclass(frozen=True)
class SimulationOutcome:
    """What a simulated federation gives.

    Attributes:
        acknowledgements: The coordinator's acknowledgement by contributor's name.
        mail_seconds: Processor time of Flower and Ray, which carry the letters.
    """

    acknowledgements: dict[str, dict[str, Any]]
    mail_seconds: float


def run_simulated(
    cooperative: Path,
    contributors: Sequence[LocalContributor],
    on_event: OnEvent = lambda event: None,
    *,
    workers: int | None = None,
    threads: int | None = None,
    compute: Compute | None = None,
    port: int | None = None,
    stop: threading.Event | None = None,
) -> SimulationOutcome:
    """Run a server and simulated contributors until everyone has the fused model.

    Safe to interrupt; call again to resume; called with further contributors,
    these join. Ctrl-C and SIGTERM end it and leave no process behind.

    Args:
        cooperative: The coordinator's home, made by `create_cooperative`.
        contributors: Who takes part, in the order of their partition ids; each with a home of
            its own.
        on_event: Receives what changes.
        workers: Processes that work for the contributors; None takes one a core.
        threads: Threads of the coordinator's worker; None takes all cores.
        compute: Where the coordinator's models run; its home's settings where it says nothing.
        port: Port of the server; None takes a free one.
        stop: Set it to end early.

    Raises:
        ConfigError: If two contributors share a name or a home.
        FederationError: If it was stopped before the end, a contributor was refused, or processes
            keep failing.
        MoloraError: The first error of server or contributors.
    """
    stop = stop or threading.Event()
    supervisor = SimulationSupervisor(
        cooperative,
        contributors,
        on_event,
        workers=workers,
        threads=threads,
        compute=compute,
        port=port,
    )
    with sigterm_as_interrupt(), supervisor:
        while not supervisor.is_finished and not stop.wait(POLL_SECONDS):
            supervisor.poll()
    if not supervisor.is_finished:
        raise FederationError(
            f"Stopped before the end: expected {len(contributors)} contributors to have the fused "
            "model, got fewer. Run the same command again to resume."
        )
    return supervisor.outcome


@dataclass(eq=False)
class _SimulatedMember:
    """One simulated contributor.

    Attributes:
        home: Its home.
        settings: What it joins with.
        agreed: Whether it agreed to what the charter asks for.
        shown: Where it stood when that was last reported.
    """

    home: ContributorHome
    settings: JoinSettings
    agreed: bool = False
    shown: FederationEvent | None = field(default=None, repr=False)

    @property
    def acknowledgement(self) -> dict[str, Any]:
        """What the coordinator acknowledged; empty before it did."""
        letter = self.home.read_acknowledgement()
        return {} if letter is None else letter.to_json()

    def settle(self) -> None:
        """Agree to what the charter asks for, once it is here: nothing leaves this machine."""
        if self.agreed:
            return
        try:
            charter = load_charter(self.home.charter)
        except CharterError:
            return  # not here yet
        if not has_consent(self.home, charter):
            give_consent(self.home, charter)
        self.agreed = True

    def check(self) -> None:
        """Raise the bad news there is.

        Raises:
            FederationError: If the server refused this contributor.
            MoloraError: Whatever ended its work.
        """
        self.home.check_refusal()
        if self.home.error_file.exists():
            name = self.settings.name
            raise_recorded(self.home.error_file, otherwise=f"Cannot go on for '{name}'.")

    def describe(self) -> FederationEvent | None:
        """Where it stands, if that has changed."""
        state = self.home.read_state()
        if not state:
            return None
        event = FederationEvent(
            **state,
            contributor=self.settings.name,
            state=str(self.acknowledgement.get("state", "")),
            seen_by="contributor",
        )
        if event == self.shown:
            return None
        self.shown = event
        return event


class SimulationSupervisor:
    """All processes of a simulated federation; a context manager that leaves none behind.

    Entering starts them, `poll` (about three times a second) watches and reports, until
    `is_finished`.

    Args:
        cooperative: The coordinator's home.
        contributors: Who takes part, in the order of their partition ids.
        on_event: Receives what changes.
        workers: Processes that work for the contributors; None takes one a core.
        threads: Threads of the coordinator's worker; None takes all cores.
        compute: Where the coordinator's models run; its home's settings where it says nothing.
        port: Port of the server; None takes a free one.
        reserve: How many more may `join` while it runs.
    """

    def __init__(
        self,
        cooperative: Path,
        contributors: Sequence[LocalContributor],
        on_event: OnEvent,
        *,
        workers: int | None = None,
        threads: int | None = None,
        compute: Compute | None = None,
        port: int | None = None,
        reserve: int = 0,
    ) -> None:
        _check_distinct(contributors)
        self._contributors = list(contributors)
        self._members = [
            _SimulatedMember(ContributorHome(one.home), one.settings) for one in contributors
        ]
        self._capacity = len(contributors) + reserve
        self._on_event = on_event
        self._names = [f"pool-{number}" for number in range(workers or count_cores())]
        self._partitions = cooperative.absolute() / "mail" / "partitions.json"
        self._pool = ProcessGroup(
            cooperative.absolute() / "logs", cooperative.absolute() / "pool-processes.json"
        )
        self._noted = cooperative.absolute() / "mail" / "scratch.json"
        self._scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH_PREFIX))
        self._server = ServerSupervisor(
            cooperative,
            find_free_port(HOST) if port is None else port,
            self._emit,
            host=HOST,
            threads=threads,
            compute=compute,
            fleet=simulate_fleet(
                self._partitions, nodes=self._capacity, actors=ACTORS, scratch=self._scratch
            ),
        )
        self._restarts = Restarts()
        self._entered = ExitStack()
        self._mail_seconds = 0.0

    @property
    def is_finished(self) -> bool:
        """Whether every contributor has the fused model."""
        return all(m.home.read_state().get("phase") == "DONE" for m in self._members)

    @property
    def outcome(self) -> SimulationOutcome:
        """What came out so far."""
        answers = {member.settings.name: member.acknowledgement for member in self._members}
        return SimulationOutcome(answers, self._mail_seconds)

    def __enter__(self) -> "SimulationSupervisor":
        """Start everything; what was started ends again if something fails."""
        with ExitStack() as entered:
            entered.callback(shutil.rmtree, self._scratch, ignore_errors=True)
            for member in self._members:
                self._prepare(member, entered)
            self._pool.end_leftovers()
            self._note_partitions()
            self._note_scratch()
            entered.enter_context(self._server)
            entered.callback(self._pool.stop_all)
            for name in self._names:
                self._start_worker(name)
            self._entered = entered.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        """End everything."""
        self._entered.close()

    def _prepare(self, member: _SimulatedMember, entered: ExitStack) -> None:
        entered.enter_context(hold_lock(member.home.root / "join.lock", what="a contributor"))
        member.home.remove_leftovers()
        member.settings = prepare_home(member.home, member.settings)

    def _note_partitions(self) -> None:
        write_partitions(self._partitions, [member.home.root for member in self._members])

    def _note_scratch(self) -> None:
        """Remove what Ray left of a simulation that was killed, and note where this one's lies."""
        earlier = read_json(self._noted)
        if earlier is not None:
            folder = Path(earlier["folder"])
            if folder.parent == self._scratch.parent and folder.name.startswith(_SCRATCH_PREFIX):
                shutil.rmtree(folder, ignore_errors=True)
        write_json(self._noted, {"folder": str(self._scratch)})

    def join(self, contributor: LocalContributor) -> None:
        """Let one more contributor take part, at one of the nodes that were reserved.

        Raises:
            ConfigError: If no node is left, its name or home is taken, or a setting is wrong.
            MoloraError: What `prepare_home` raises.
        """
        _check_distinct([*self._contributors, contributor])
        if len(self._members) >= self._capacity:
            raise ConfigError(
                f"Cannot let '{contributor.settings.name}' join: expected a free node of "
                f"{self._capacity}, got none. Reserve more."
            )
        member = _SimulatedMember(ContributorHome(contributor.home), contributor.settings)
        self._prepare(member, self._entered)
        self._contributors.append(contributor)
        self._members.append(member)
        self._note_partitions()

    def _start_worker(self, name: str) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", POOL_MODULE, str(self._partitions)]
        self._pool.start(name, command, env)

    def poll(self) -> None:
        """Look after the processes once, and report what changed.

        Raises:
            FederationError: If a contributor was refused, or processes keep failing.
            MoloraError: The first error of server or contributors.
        """
        self._server.poll()
        self._mail_seconds = self._server.measure_mail_seconds()
        self._pool.poll()
        for name in self._names:
            code = self._pool.exit_code(name)
            if code is not None:
                self._restarts.note("a worker of the pool", self._pool.log(name))
                self._warn(f"worker {name} ended with {code}; started again")
                self._start_worker(name)
        for member in self._members:
            member.settle()
            member.check()
            event = member.describe()
            if event is not None:
                self._on_event(event)

    def _warn(self, message: str) -> None:
        self._on_event(FederationEvent(self._server.phase, message=message, problem=True))

    def _emit(self, event: FederationEvent) -> None:
        """Hand on what the server says of itself; contributors speak for themselves."""
        if not event.contributor or event.problem:
            self._on_event(event)


def _check_distinct(contributors: Sequence[LocalContributor]) -> None:
    for what, values in (
        ("name", [contributor.settings.name for contributor in contributors]),
        ("home", [str(contributor.home.absolute()) for contributor in contributors]),
    ):
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ConfigError(
                f"Cannot simulate contributors: expected each {what} once, got "
                f"{', '.join(twice)} more than once. Give each contributor its own."
            )
