"""Cases of bench/bad_input.py with processes that are killed, and disks that fill in an upload."""

import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bad_input_files import find_free_port
from bad_input_stage import Outcome, Stage, wait_until

from molora_fed.federation.homes import ContributorHome, CoordinatorHome
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.messages import describe_folder
from molora_fed.federation.supervise import parse_answer

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from process_helpers import Mount  # noqa: E402

__all__ = ["run_killed_training", "run_upload_cases"]

MESSAGE_BYTES = "40000"
"""A quarter of a contribution: an upload takes several messages."""
SMALL_BYTES = 10_000
"""Less than a part."""
TOLD_TO_END = 128 + signal.SIGTERM


def _hash_files(folder: Path) -> dict[str, str]:
    return {entry.name: entry.sha256 for entry in describe_folder(folder).files}


def run_killed_training(stage: Stage, cooperative: str) -> Outcome:
    """`molora train` killed in mid-training and started again, beside a run left alone."""
    arguments = "train --cooperative {} --domain abc --data texts-abc --threads 1 --name abc-1"
    arguments = arguments.format(cooperative) + " --out "
    stage.expect(arguments + "undisturbed")
    there = stage.list_files()
    process = stage.start(arguments + "killed")
    held = stage.root / "killed"
    wait_until(lambda: list(held.rglob("checkpoint*")), "a checkpoint", seconds=60)
    process.kill()
    process.communicate()
    is_done = (held / "adapter").exists()
    again = stage.start(arguments + "killed")
    _, err = again.communicate(timeout=300)
    outcome = stage.build_outcome(
        "contributor killed in mid-training", "`molora train`, SIGKILL, the same command again",
        arguments + "killed", (again.returncode, 0), err, there=there,
    )  # fmt: skip
    if is_done or process.returncode != -signal.SIGKILL:
        outcome.problems.append("was not killed in mid-training")
    if _hash_files(held / "adapter") != _hash_files(stage.root / "undisturbed" / "adapter"):
        outcome.problems.append("other adapter bytes than an undisturbed run")
    if not outcome.problems:
        outcome.note = (
            "killed: checkpoint kept, no adapter yet; again: exit 0, adapter bytes equal "
        )
        outcome.note += "an undisturbed run's"
    return outcome


class _Upload:
    """A server and a contributor whose adapter is uploaded in several messages."""

    def __init__(self, stage: Stage, cooperative: str) -> None:
        self.stage = stage
        self.home = CoordinatorHome(stage.root / cooperative)
        self.contributor = ContributorHome(stage.root / "uploader")
        port = find_free_port()
        self.serve = f"serve {cooperative} --insecure --port {port} --threads 1"
        self.join = (
            f"join --server 127.0.0.1:{port} --domain abc --data texts-abc --home uploader "
            "--threads 1 --name abc-1 --yes"
        )
        self._cooperative = cooperative
        self._num_started = 0
        self.server = self.start_server()

    def start_server(self) -> "subprocess.Popen[str]":
        """Start the server, or start it again; outputs in files of their own."""
        self._num_started += 1
        self.server = self.stage.start(
            self.serve, log=f"serve-{self._num_started}", MOLORA_MESSAGE_BYTES=MESSAGE_BYTES
        )
        return self.server

    def read(self, kind: str) -> str:
        """What the present server said: "out" or "err"."""
        path = self.stage.root / f"serve-{self._num_started}.{kind}"
        return path.read_text(encoding="utf-8")

    def num_held(self) -> int:
        """Bytes of the contribution that the server holds."""
        return sum(
            part.length for mailbox in self.home.contributors() for part in mailbox.parts.held()
        )

    def carrier(self) -> int:
        """Process id of what carries the mail now; 0 if nothing does."""
        pulse = parse_answer(self.home.pulse.read())
        return int(pulse.get("pid", 0))

    def wait_for_end_of(self, folder: str) -> None:
        """Wait until nothing works in a folder any more."""
        wait_until(lambda: not self.stage.find_processes(folder), f"the end of all in {folder}", 60)

    def wait_for_problem(self, word: str) -> str:
        """Wait for the line on a full disk, and give it."""
        lines = wait_until(
            lambda: [line for line in self.read("out").splitlines() if word in line], word, 90
        )
        return str(lines[0])

    def end_server(self) -> int:
        """Tell the server to end."""
        self.server.send_signal(signal.SIGTERM)
        code = self.server.wait(timeout=60)
        self.wait_for_end_of(self._cooperative)
        return code


def run_upload_cases(stage: Stage, cooperative: str) -> Iterator[Outcome]:
    """A contributor killed in training, its server killed in the upload, then two full disks.

    One contribution lives through all of it, and must be admitted in the end.
    """
    there = stage.list_files()
    mount = Mount(stage.root / cooperative / "mail" / "contributors")
    try:
        upload = _Upload(stage, cooperative)
        yield _kill_contributor(upload, there)
        joining = stage.start(upload.join, log="join-2")
        yield _kill_server(upload, there)
        limited = _limit_files(upload, there)
        yield limited
        filled = _fill_disk(upload, mount) if mount.is_there else ("", "")
        if not mount.is_there:
            upload.start_server()
        code = joining.wait(timeout=300)
        final = stage.build_outcome(
            "server killed in mid-upload", "the contributor, through all of this",
            upload.join, (code, 0), (stage.root / "join-2.err").read_text(), there=there,
        )  # fmt: skip
        final.note = _describe_end(upload, final)
        ended = upload.end_server()
        if mount.is_there:
            how = "full tmpfs, then space again; told to end after the fusion"
            yield _describe_full(upload, how, (ended, *filled), there)
        yield final
    finally:
        stage.close()
        mount.close()


def _kill_contributor(upload: _Upload, there: dict[str, str]) -> Outcome:
    """SIGKILL `molora join` with its worker while it trains."""
    stage = upload.stage
    # The server is up when its run beats.
    wait_until(upload.carrier, "the server's mail")
    process = stage.start(upload.join, log="join-1")

    def is_training() -> bool:
        state = upload.contributor.read_state()
        return state.get("phase") == "TRAINING" and state.get("step", 0) > 0

    wait_until(is_training, "training")
    workers = stage.find_processes("uploader")
    process.kill()
    for worker in workers:
        if worker.is_running():
            worker.kill()
    code = process.wait()
    upload.wait_for_end_of("uploader")
    outcome = stage.build_outcome(
        "contributor killed in mid-training", "`molora join` and its processes, SIGKILL",
        upload.join, (code, -signal.SIGKILL), (stage.root / "join-1.err").read_text(), there=there,
    )  # fmt: skip
    if any(upload.contributor.training.glob("*/adapter")):
        outcome.problems.append("was not killed in mid-training")
    # What a killed process was writing lies under a temporary name; it is looked at in the end.
    outcome.problems = [p for p in outcome.problems if not p.startswith("left ")]
    outcome.note = "started again, see the last row"
    return outcome


def _kill_server(upload: _Upload, there: dict[str, str]) -> Outcome:
    """SIGKILL `molora serve` when a part of the contribution has arrived."""
    # More than one part, so that there is something to go on from.
    wait_until(lambda: upload.num_held() > int(MESSAGE_BYTES), "the first parts", seconds=240)
    upload.server.kill()
    code = upload.server.wait()
    upload.wait_for_end_of(upload.home.root.name)
    held, whole = (
        upload.num_held(),
        sum(entry.num_bytes for entry in describe_folder(upload.contributor.contribution).files),
    )
    outcome = upload.stage.build_outcome(
        "server killed in mid-upload", "SIGKILL", upload.serve, (code, -signal.SIGKILL),
        upload.read("err"), there=there,
    )  # fmt: skip
    outcome.problems = [p for p in outcome.problems if not p.startswith("left ")]
    if not 0 < held < whole:
        outcome.problems.append(f"was not killed in mid-upload: {held} of {whole} bytes")
    outcome.note = f"held {held:,} of {whole:,} bytes; started again, see the last row"
    upload.start_server()
    return outcome


def _limit_files(upload: _Upload, there: dict[str, str]) -> Outcome:
    """No part fits into a file of the mail-carrying process; then the server is told to end."""
    held = upload.num_held()
    before = upload.home.pulse.read()
    carrier = wait_until(
        lambda: upload.home.pulse.read() != before and upload.carrier(), "the server's mail"
    )
    resource.prlimit(carrier, resource.RLIMIT_FSIZE, (SMALL_BYTES, resource.RLIM_INFINITY))
    line = upload.wait_for_problem("File too large")
    gained = upload.num_held() - held
    code = upload.end_server()
    note = f"parts held before and after: {held:,} and {held + gained:,} bytes"
    return _describe_full(upload, "file-size limit, then told to end", (code, line, note), there)


def _fill_disk(upload: _Upload, mount: Mount) -> tuple[str, str]:
    """The folder of uploads is a file system without a free page; then it has space again.

    Returns:
        The line about it, and a note on what was held.
    """
    mount.fill()
    held = upload.num_held()
    upload.start_server()
    line = upload.wait_for_problem("No space left")
    note = f"parts held before and after: {held:,} and {upload.num_held():,} bytes"
    mount.empty()
    return line, note


def _describe_full(
    upload: _Upload, how: str, what: tuple[int, str, str], there: dict[str, str]
) -> Outcome:
    """A server that met a full disk: it says so on standard output, and goes on once told to."""
    code, line, note = what
    err = upload.read("err")
    outcome = upload.stage.build_outcome(
        "disk full during an upload", how, upload.serve, (code, TOLD_TO_END), f"{line}\n{err}",
        there=there, lines=len(err.splitlines()),
    )  # fmt: skip
    if "Free some space" not in line:
        outcome.problems.append("does not say what to do")
    outcome.note = note
    return outcome


def _describe_end(upload: _Upload, outcome: Outcome) -> str:
    """Hold the admitted contribution against what was trained without disturbance."""
    state = (read_json(upload.contributor.acknowledgement_letter) or {}).get("state")
    if state != "ADMITTED":
        outcome.problems.append(f"ended {state}")
    sent = _hash_files(upload.contributor.contribution / "adapter")
    if sent != _hash_files(upload.stage.root / "undisturbed" / "adapter"):
        outcome.problems.append("other adapter bytes than an undisturbed run")
    stored = list((upload.home.root / "blobs" / "folders").iterdir())
    for part in ("adapter", "samples"):
        whole = _hash_files(upload.contributor.contribution / part)
        if whole not in [_hash_files(folder / part) for folder in stored]:
            outcome.problems.append(f"the server has another {part} folder than was sent")
    if outcome.problems:
        return f"ended {state}"
    return f"{state}, adapter bytes equal an undisturbed run's, fused model received"
