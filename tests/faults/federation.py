"""One federation of real commands on copies of the homes, disturbed, and looked over afterwards."""

import contextlib
import itertools
import json
import shutil
import sqlite3
import time

import psutil
from commands import Command, build_environment, list_join_arguments, list_serve_arguments
from fault_stage import MEMBERS, SERVER, hash_files
from faults import (
    KINDS,
    SAID_AFTER_SECONDS,
    SAYS,
    STAGES,
    build_clock_environment,
    find_clock_file,
    find_faketime,
    forget_clock,
    is_plain,
    write_clock,
)
from process_helpers import Mount, find_processes
from relay import Relay

from molora_fed.federation.homes import ContributorHome, CoordinatorHome
from molora_fed.federation.supervise import parse_answer
from molora_fed.serving.addresses import find_free_port

__all__ = ["FederationRun", "prepare_stage"]

LOOK_SECONDS = 0.1
PATIENCE_SECONDS = 420.0
"""Time without a fault or a new stage after which a run is stuck: above the longest wait, 300 s."""
HOME_BYTES = 64 * 2**20
TOLD_TO_END = 143
TAIL_CHARACTERS = 6_000


class FederationRun:
    """A server and its members, from their first start to the fused model; a context manager.

    Attributes:
        commands: By name, the server's first.
        relays: Each member's line to the server.
        mounts: File systems that can be filled, by name, where there are any.
        problems: What was not as it should be.
        events: What happened, with the seconds since the start.

    Args:
        stage: The homes.
        root: An empty folder for the copies.
        faults: In the order in which they begin.
        seed: Of what the relays draw.
        patience_seconds: Time without a fault or a new stage after which it counts as stuck.
    """

    def __init__(self, stage, root, faults=(), *, seed=0, patience_seconds=PATIENCE_SECONDS):
        self.stage = stage
        self.root = root
        self.faults = list(faults)
        self.problems = []
        self.events = []
        self.commands = {}
        self.mounts = {}
        self._patience_seconds = patience_seconds
        self._exit = contextlib.ExitStack()
        self._port = find_free_port()
        self._plain = is_plain(faults)
        self._clocks = {}
        self._seen = {}
        self._acknowledged = {}
        self._started = time.monotonic()
        self.relays = {
            name: Relay(self._port, seed, reads_requests=self._plain) for name in MEMBERS
        }

    def __enter__(self):
        self._kill_all()  # what a program that was killed left
        self.forget()
        self.root.mkdir(parents=True)
        try:
            for relay in self.relays.values():
                self._exit.enter_context(relay)
            for name in (SERVER, *MEMBERS):
                self._prepare(name)
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(self, *exception):
        self._kill_all()
        for pid in {pid for name in self._clocks for pid in self.commands[name].pids}:
            forget_clock(pid)
        self._exit.close()

    def _kill_all(self):
        left = find_processes(self.root)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=20)

    def _prepare(self, name):
        """Copy a home, and make what faults of its side need."""
        home = self.root / name
        kinds = {fault.kind for fault in self.faults if fault.side == name}
        if "disk" in kinds:
            mount = Mount(home, num_bytes=HOME_BYTES)
            self._exit.callback(mount.close)
            if mount.is_there:
                self.mounts[name] = mount
        if name == SERVER:
            self.stage.copy_home(name, home)
            more = ["--insecure"] if self._plain else []
            arguments = list_serve_arguments(home, self._port, *more)
        else:
            address = f"127.0.0.1:{self.relays[name].port}"
            self.stage.copy_home(name, home, server=address)
            more = ["--server", address, "--domain", name, "--name", name] if self._plain else []
            arguments = list_join_arguments(home, self.stage.texts / name, *more)
        environment = build_environment()
        if "clock" in kinds and (library := find_faketime()) is not None:
            path = self._clocks[name] = find_clock_file(name)
            self._exit.callback(path.unlink, missing_ok=True)
            self.set_clock(name, 0.0)
            environment |= build_clock_environment(library, path)
        self.commands[name] = Command(name, home, arguments, environment, self.root)

    def set_clock(self, name, seconds):
        """Let the clock of a side's processes be off."""
        if name in self._clocks:
            write_clock(self._clocks[name], seconds)

    def _note(self, what):
        self.events.append((round(time.monotonic() - self._started, 1), what))

    def run(self):
        """Run until all members have the fused model and every fault is over, then end it.

        Returns:
            What is kept of it, for JSON.
        """
        self._started = time.monotonic()
        for command in self.commands.values():
            command.start()
        pending, active, done = list(self.faults), [], []
        deadline, moved = time.monotonic() + self._patience_seconds, (0, 0)
        while pending or active or not (self._is_published() and self._is_serving()):
            self._look()
            now = time.monotonic()
            if active or moved != (len(self._seen), len(done)):
                moved, deadline = (len(self._seen), len(done)), now + self._patience_seconds
            if pending and self._is_time(pending[0], now):
                active.append(self._begin(pending.pop(0), now))
            for fault in [one for one in active if now >= one["until"]]:
                active.remove(fault)
                done.append(self._lift(fault, others=active))
            if now > deadline or any(c.problems for c in self.commands.values()):
                self._note("given up")
                break
            time.sleep(LOOK_SECONDS)
        done += [self._lift(fault, others=active) for fault in active]
        published = round(time.monotonic() - self._started, 1)
        is_published = self._is_published()
        if not is_published:
            self.problems.append("not published")
        self._end()
        self.check()
        for command in self.commands.values():
            self.problems += command.problems
        return {
            "outcome": "published" if is_published else "stuck",
            "transport": "plain" if self._plain else "tls",
            "seconds": published,
            "faults": done,
            "starts": {name: len(command.pids) for name, command in self.commands.items()},
            "ends": {name: command.ends for name, command in self.commands.items() if command.ends},
            "events": self.events,
            "problems": self.problems,
        }

    def _is_time(self, fault, now):
        """Whether a fault begins: its stage, or a later one, was seen so many seconds ago."""
        times = [self._seen[s] for s in STAGES[STAGES.index(fault.stage) :] if s in self._seen]
        return bool(times) and now >= min(times) + fault.delay

    def _begin(self, fault, now):
        context = KINDS[fault.kind](self, fault)
        met = context.__enter__()
        self._note(f"begun: {fault.describe()}, met {met or 'nothing'}")
        said = self.commands[met].read_said() if met in self.commands else ""
        return {"fault": fault, "context": context, "met": met, "until": now + fault.seconds,
                "began": now, "phase": self._phase(), "said": len(said)}  # fmt: skip

    def _lift(self, active, others):
        """Lift a fault, and see whether the command said what it waits for."""
        active["context"].__exit__(None, None, None)
        fault, met = active["fault"], active["met"]
        words, said = SAYS.get(fault.kind), None
        if words and met in self.commands:
            said = words in self.commands[met].read_said()[active["said"] :]
            is_noticed = fault.kind == "cut" and fault.seconds >= SAID_AFTER_SECONDS
            if is_noticed and not said and not others and self.commands[met].is_running:
                self.problems.append(f"{met} did not say that the server does not answer")
        if fault.seconds:
            self._note(f"lifted: {fault.kind} {met}" + (", said so" if said else ""))
        return {
            **vars(fault), "met": met, "phase": active["phase"], "said": said,
            "at": round(active["began"] - self._started, 1),
        }  # fmt: skip

    def _is_published(self):
        return all(self.commands[name].is_done for name in MEMBERS)

    def _is_serving(self):
        """Whether the server stands as it should: mail is carried, and a worker is there."""
        server = self.commands[SERVER]
        link, worker = server.find_process("link"), server.find_process("coordinator")
        pulse = parse_answer(CoordinatorHome(server.home).pulse.read())
        return None not in (link, worker) and pulse.get("pid") == link.pid

    def _phase(self):
        return next((stage for stage in reversed(STAGES) if stage in self._seen), "")

    def _look(self):
        """Look after the commands, and see how far they are."""
        for command in self.commands.values():
            starts = len(command.pids)
            command.watch()
            if len(command.pids) != starts:
                last = f": {command.ends[-1][:160]}" if command.ends else ""
                self._note(f"{command.name} started again{last}")
        home = CoordinatorHome(self.root / SERVER)
        members = [ContributorHome(self.root / name) for name in MEMBERS]
        for member in members:
            letter = member.read_acknowledgement()
            if letter is not None:
                self._acknowledged[letter.contribution_id] = letter.state
        state = home.read_state()
        signs = {
            "started": lambda: parse_answer(home.pulse.read()),
            "joined": lambda: home.contributors(),
            "training": lambda: any(m.read_state().get("phase") == "TRAINING" for m in members),
            "uploading": lambda: any(mailbox.parts.held() for mailbox in home.contributors()),
            "admitted": lambda: self._acknowledged,
            "fusing": lambda: state.get("phase") == "FUSING",
            "published": lambda: (home.outbox / "result.json").exists(),
            "received": lambda: any((member.result / "fused").is_dir() for member in members),
        }
        for stage in STAGES:
            if stage not in self._seen and signs[stage]():
                self._seen[stage] = time.monotonic()
                self._note(f"seen: {stage}")

    def _end(self):
        """Tell what still runs to end, as by Ctrl-C."""
        for name in (*MEMBERS, SERVER):
            command = self.commands[name]
            command.is_held = True
            code = command.tell_to_end()
            if name == SERVER and code != TOLD_TO_END:
                lines = " / ".join(command.read_new_errors()[-4:])
                self.problems.append(f"told to end, the server ended with {code}: {lines}")

    def check(self):
        """Hold what is left against what must be."""
        left = [p for p in find_processes(self.root) if p.status() != psutil.STATUS_ZOMBIE]
        self.problems += [f"left running: {' '.join(p.cmdline())[:300]}" for p in left]
        homes = [CoordinatorHome(self.root / SERVER)]
        homes += [ContributorHome(self.root / name) for name in MEMBERS]
        for home in homes:
            home.remove_leftovers()  # as the next start does
        patterns = itertools.chain.from_iterable(self.root.rglob(p) for p in (".*.tmp", ".*.old"))
        self.problems += [f"left {path.relative_to(self.root)}" for path in patterns]
        self.problems += self._check_ledger()
        if self._is_published():
            for name in (SERVER, *MEMBERS):
                folder = self.root / name / ("fused" if name == SERVER else "result/fused")
                self.problems += _compare(name, self.stage.fused, hash_files(folder))
        for name in (SERVER, *MEMBERS):
            for log in sorted((self.root / name / "logs").glob("*.log")):
                for line in _find_tracebacks(log):
                    self.problems.append(f"traceback in {name}/logs/{log.name}: {line}")

    def _check_ledger(self):
        """Whether the ledger is whole, and holds what was acknowledged, once for each member."""
        problems = []
        path = self.root / SERVER / "ledger.db"
        with contextlib.closing(sqlite3.connect(path)) as database:
            found = database.execute("PRAGMA integrity_check").fetchone()[0]
            rows = database.execute("SELECT id, contributor, state FROM contributions").fetchall()
        if found != "ok":
            problems.append(f"ledger: {found}")
        states = {row[0]: row[2] for row in rows}
        for contribution, state in self._acknowledged.items():
            if states.get(contribution) != state:
                problems.append(
                    f"acknowledged as {state}, in the ledger {states.get(contribution)}: "
                    f"{contribution}"
                )
        counted = sorted(row[1] for row in rows if row[2] == "ADMITTED")
        if self._is_published() and counted != sorted(MEMBERS):
            problems.append(f"counted {counted}")
        return problems

    def read_tails(self):
        """The ends of all logs, for somebody who looks for the cause."""
        logs = [*sorted(self.root.glob("*.err")), *sorted(self.root.glob("*.out"))]
        logs += sorted(self.root.glob("*/logs/*.log"))
        return "\n".join(
            f"== {log.relative_to(self.root)}\n"
            + log.read_text("utf-8", "replace")[-TAIL_CHARACTERS:]
            for log in logs
        )

    def forget(self):
        """Delete the copies."""
        shutil.rmtree(self.root, ignore_errors=True)


def prepare_stage(stage, root):
    """Make the homes, and note what an undisturbed run makes of copies below a folder.

    Raises:
        AssertionError: If even that run has problems.
    """
    stage.make_homes()
    with FederationRun(stage, root) as run:
        found = run.run()
        assert not found["problems"], f"{found['problems']}\n{run.read_tails()}"
        stage.note_reference(hash_files(run.root / SERVER / "fused"), found["seconds"])
    run.forget()


def _compare(name, expected, got):
    """Which files are others than the undisturbed run's."""
    if not expected:
        return []
    names = sorted(n for n in {*expected, *got} if expected.get(n) != got.get(n))
    return [f"{name} has other bytes than the undisturbed run: {json.dumps(names)}"] * bool(names)


def _find_tracebacks(log):
    """The last line of every traceback in a log."""
    lines, inside, found = log.read_text("utf-8", "replace").splitlines(), False, []
    for line in lines:
        if line.startswith("Traceback"):
            inside = True
        elif inside and line and not line.startswith(" "):
            found.append(line[:200])
            inside = False
    return found
