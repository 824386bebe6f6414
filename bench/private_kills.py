"""Kills at random moments of a private fusion; it must end with the router of the undisturbed run.

    python bench/private_kills.py --kills 50 --summing masked --out docs/results/private_kills.md

Three contributors and a coordinator, each the worker process that `molora join` and `molora serve`
run, with letters carried by this process. Their homes are prepared once, up to where all are
admitted; every run begins with copies of them. At random moments one worker is ended by SIGKILL and
started again, or the line to one contributor is lost with what was on it. A run counts if all
members hold the fused model whose router has the bytes of the undisturbed run.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from stage_helpers import MESSAGE_BYTES, TRAINING, Stage  # noqa: E402

from molora_fed.charter import Amendment, FusionRules, PrivacyRules, SampleRules  # noqa: E402
from molora_fed.errors import MoloraError  # noqa: E402
from molora_fed.federation.client_dialogue import answer  # noqa: E402
from molora_fed.federation.homes import ContributorHome, CoordinatorHome  # noqa: E402
from molora_fed.federation.mailbox import read_json  # noqa: E402
from molora_fed.federation.server_dialogue import RemoteContributor, ServerDialogue  # noqa: E402
from molora_fed.storage.files import hash_file, write_bytes, write_json  # noqa: E402
from molora_fed.testing import build_tiny_checkpoint  # noqa: E402

MEMBERS = ("alpha", "beta", "gamma")
SERVER = "server"
RULES = FusionRules(
    router="evidence-mixed", compare=("evidence", "statistics"), merges=("average",)
)
SAMPLES = SampleRules(calibration=60, admission=4, held_out=60)
LIMIT_SECONDS = 600.0
EVERY = (1, 10)  # exchanges between two kills
LATER = 1.5  # seconds at most after an exchange began
WORKERS = {
    SERVER: "molora_fed.federation.coordinator",
    **dict.fromkeys(MEMBERS, "molora_fed.federation.worker"),
}


class Admitted(Exception):
    """All contributions are in, and the first question is out."""


@dataclass
class Run:
    """One fusion from copies of the homes.

    Attributes:
        folder: Of the copies.
        processes: Workers by name.
        lines: What the carrier knows of each contributor.
        killed: What was killed, in which phase.
        asked: Ids of the questions that went out.
    """

    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    lines: dict[str, RemoteContributor] = field(default_factory=dict)
    killed: list[str] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)

    def start(self, name: str) -> None:
        """Start a worker, or start it again."""
        log = (self.folder / f"{name}.log").open("ab")
        command = [sys.executable, "-m", WORKERS[name], str(self.folder / name)]
        self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self, draw: random.Random) -> None:
        """End one worker, or lose one line."""
        name = draw.choice([SERVER, *MEMBERS, *MEMBERS])
        state = CoordinatorHome(self.folder / SERVER).read_state()
        place = state.get("message", "").split(":")[0]
        if name in MEMBERS and draw.random() < 0.25:
            self.lines[name] = RemoteContributor()
            self.killed.append(f"line to {name}, {place}")
            return
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait()
        self.start(name)
        self.killed.append(f"{name}, {place}")

    def carry(self, dialogue: ServerDialogue) -> None:
        """Bring every contributor what there is for it, and its reply back."""
        for name in MEMBERS:
            home = ContributorHome(self.folder / name)
            if home.question_letter.is_file():
                self.asked.add(str((read_json(home.question_letter) or {}).get("id")))
            try:
                envelope = dialogue.next_envelope(self.lines[name])
                if envelope is not None:
                    dialogue.accept(self.lines[name], answer(home, envelope))
            except MoloraError as error:
                self.lines[name] = RemoteContributor()
                self.killed.append(f"message of {name} refused: {error}")

    def is_done(self) -> bool:
        """Whether every member has the result."""
        return all((self.folder / n / "result" / "fused").is_dir() for n in MEMBERS)

    def end(self) -> None:
        """End what still runs."""
        for process in self.processes.values():
            process.kill()
            process.wait()

    def read_router(self) -> set[str]:
        """Hashes of the router that each side holds: one."""
        places = [self.folder / SERVER, *(self.folder / name / "result" for name in MEMBERS)]
        return {hash_file(place / "fused" / "router.safetensors") for place in places}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--summing", choices=("masked", "robust"), default="masked")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/results/private_kills.md"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        outcome = study(Path(scratch), arguments.kills, arguments.summing, arguments.seed)
    outcome["command"] = (
        f"python bench/private_kills.py --kills {arguments.kills} --summing {arguments.summing} "
        f"--seed {arguments.seed}"
    )
    write_json(arguments.out.with_suffix(f".{arguments.summing}.json"), outcome)
    pages = sorted(arguments.out.parent.glob(f"{arguments.out.stem}.*.json"))
    write_bytes(arguments.out, build_page([json.loads(p.read_bytes()) for p in pages]).encode())
    bad = [run for run in outcome["runs"] if not run["same"]]
    print(f"{outcome['kills']} kills in {len(outcome['runs'])} fusions, {len(bad)} ended otherwise")
    raise SystemExit(1 if bad else 0)


def study(scratch: Path, kills: int, summing: str, seed: int) -> dict[str, object]:
    """Run until there were so many kills."""
    homes = prepare(scratch / "homes", summing)
    draw = random.Random(seed)
    undisturbed = fuse(homes, scratch / "undisturbed", draw, kills=0)
    expected = undisturbed.read_router()
    assert len(expected) == 1
    runs, done = [], 0
    while done < kills:
        began = time.monotonic()
        run = fuse(homes, scratch / f"run-{len(runs)}", draw, kills=kills - done)
        same = run.is_done() and run.read_router() == expected
        runs.append(
            {"killed": run.killed, "same": same, "seconds": round(time.monotonic() - began, 1)}
        )
        done += len(run.killed)
        print(f"{done} kills, fusion {len(runs)}: {'same' if same else 'OTHERWISE'}", flush=True)
        if same:
            shutil.rmtree(run.folder)
    return {"summing": summing, "kills": done, "runs": runs, "router": expected.pop()}


def prepare(folder: Path, summing: str) -> Path:
    """Homes in which all contributors are admitted and the fusion has begun."""
    stage = Stage(
        folder,
        build_tiny_checkpoint(folder / "checkpoint", "gpt_neox", 0),
        Amendment(expected=len(MEMBERS), training=TRAINING, fusion=RULES, samples=SAMPLES),
        privacy=PrivacyRules(mode="private", summing=summing),
    )

    def watch(stage: Stage, who: str) -> bool:
        if list((stage.server.outbox / "questions").glob("*")):
            raise Admitted
        return True

    try:
        stage.run(*MEMBERS, meddle=watch)
    except Admitted:
        return folder
    raise RuntimeError("expected a question, got none")


def fuse(homes: Path, folder: Path, draw: random.Random, *, kills: int) -> Run:
    """One fusion, with kills while it goes on."""
    for name in (SERVER, *MEMBERS):
        shutil.copytree(homes / name, folder / name, symlinks=True)
    run = Run(folder, lines={name: RemoteContributor() for name in MEMBERS})
    dialogue = ServerDialogue(
        CoordinatorHome(folder / SERVER), message_bytes=MESSAGE_BYTES, wait_seconds=0
    )
    for name in (SERVER, *MEMBERS):
        run.start(name)
    deadline = time.monotonic() + LIMIT_SECONDS
    due, moment = draw.randint(*EVERY), 0.0
    try:
        while not run.is_done() and time.monotonic() < deadline:
            run.carry(dialogue)
            if kills > len(run.killed) and len(run.asked) >= due:
                if not moment:
                    moment = time.monotonic() + draw.uniform(0.0, LATER)
                if time.monotonic() >= moment:
                    run.kill(draw)
                    due, moment = len(run.asked) + draw.randint(*EVERY), 0.0
            time.sleep(0.02)
    finally:
        run.end()
    return run


def build_page(outcomes: list[dict[str, object]]) -> str:
    """The page of results."""
    lines = ["# Kills in private fusions", ""]
    for outcome in outcomes:
        runs = outcome["runs"]
        assert isinstance(runs, list)
        same = sum(run["same"] for run in runs)
        lines += [
            f"## {str(outcome['summing']).capitalize()} sums",
            "",
            f"`{outcome['command']}`: {outcome['kills']} kills in {len(runs)} fusions of three "
            f"members from copies of the same homes; {same} of {len(runs)} ended with the router "
            f"of the undisturbed run at all four sides (SHA-256 {str(outcome['router'])[:16]}).",
            *(["", str(outcome["note"])] if "note" in outcome else []),  # by hand, of that run
            "",
            "| fusion | killed | same bytes | seconds |",
            "|---|---|---|---|",
        ]
        for number, run in enumerate(runs, 1):
            killed = "; ".join(run["killed"])
            lines.append(
                f"| {number} | {killed} | {'yes' if run['same'] else 'no'} | {run['seconds']} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
