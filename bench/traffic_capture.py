"""A federation of real processes on this machine, each member's line recorded, memory read."""

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from signal import SIGCONT, SIGSTOP

import psutil
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from molora_fed.federation.mailbox import read_json
from molora_fed.serving.addresses import find_free_port
from molora_fed.storage.files import write_bytes, write_json
from molora_fed.testing.traffic import RecordingLine
from molora_fed.types import Split

__all__ = [
    "BLOCK",
    "MEMBERS",
    "SAMPLES",
    "Captured",
    "Snapshot",
    "draw_documents",
    "federate",
    "list_files",
]

MOLORA = Path(sys.executable).parent / "molora"
MEMBERS = {"alpha-1": "alpha", "beta-1": "beta", "gamma-1": "gamma", "gamma-2": "gamma"}
"""Two are alone in their domains, two share one."""
SEED = 20
LEXICON, OWN_WORDS, SUCCESSORS = 400, 140, 7
DOCUMENTS, SENTENCES, WORDS = 150, 5, 10
VOCABULARY = 700
BLOCK = 32
SAMPLES = {Split.CALIBRATION: 32, Split.ADMISSION: 16, Split.HELD_OUT: 32}
"""Blocks of each split that a fusion is made and measured with."""
SETTINGS = (
    "training.batch=4", "training.learning_rate=0.01", "training.validate_every=50",
    *(f"samples.{split.replace('-', '_')}={count}" for split, count in SAMPLES.items()),
)  # fmt: skip
COORDINATOR = "molora_fed.federation.coordinator"
FUSING = "FUSING"
MOST_SNAPSHOTS = 12
LIMIT_SECONDS = 1_800.0
_PAGE = 4_096
_END = "<|endoftext|>"
_RECORD = "captured.json"
_LEFT_OUT = ("base", "keys")


@cache
def _draw_lexicon() -> list[str]:
    draw = random.Random(SEED)
    parts = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "ar", "en")]
    words: dict[str, None] = {}
    while len(words) < LEXICON:
        words["".join(draw.choice(parts) for _ in range(draw.randint(2, 3)))] = None
    return list(words)


def draw_documents(name: str, count: int, *, fresh: bool) -> list[str]:
    """Documents of a member: of its own part of the lexicon, each word with a few successors.

    Args:
        name: The member.
        count: How many.
        fresh: Others than it has, drawn the same way.
    """
    draw = random.Random(f"{SEED} {name}")
    own = draw.sample(_draw_lexicon(), OWN_WORDS)
    after = {word: draw.sample(own, SUCCESSORS) for word in own}
    if fresh:
        draw = random.Random(f"{SEED} {name} fresh")
    texts = []
    for _ in range(count):
        lines = []
        for _ in range(SENTENCES):
            words = [draw.choice(own)]
            while len(words) < WORDS:
                words.append(draw.choice(after[words[-1]]))
            lines.append(" ".join(words).capitalize() + ".")
        texts.append("\n".join(lines))
    return texts


def _write_texts(folder: Path, name: str) -> Path:
    for number, text in enumerate(draw_documents(name, DOCUMENTS, fresh=False)):
        write_bytes(folder / f"{number:03d}.txt", text.encode())
    return folder


def _build_base(folder: Path) -> Path:
    """A small model with random weights, and a tokenizer of the lexicon that everyone may know."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    draw = random.Random(SEED)
    public = (" ".join(draw.choices(_draw_lexicon(), k=20)) + "." for _ in range(500))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[_END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(public, trainer)
    torch.manual_seed(SEED)
    end = tokenizer.token_to_id(_END)
    config = GPTNeoXConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=64, max_position_embeddings=128,
        bos_token_id=end, eos_token_id=end, initializer_range=0.15,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=_END, eos_token=_END
    ).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Snapshot:
    """Memory and files of the coordinator at one moment.

    Attributes:
        when: What it was doing.
        memory: Files of memory that was written to, pages of zeros left out, by process.
        home: Copy of its home, without the base and its keys.
    """

    when: str
    memory: dict[str, Path]
    home: Path


@dataclass
class Captured:
    """A federation that has ended, and everything that was recorded of it.

    Attributes:
        root: Where everything lies.
        lines: What each member sent and received, by connection.
        snapshots: Of the coordinator; the first from before anybody joined.
        commands: What was run.
        seconds: How long it took.
    """

    root: Path
    lines: dict[str, dict[str, list[bytes]]] = field(default_factory=dict)
    snapshots: list[Snapshot] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def server(self) -> Path:
        """The coordinator's home."""
        return self.root / "server"

    def home(self, name: str) -> Path:
        """A member's home."""
        return self.root / name

    def keep(self) -> None:
        """Write everything down: a file for each connection and direction, and the rest as JSON."""
        for name, both in self.lines.items():
            for direction, streams in both.items():
                for number, stream in enumerate(streams):
                    folder = self.root / "capture" / name
                    write_bytes(folder / f"{number:03d}.{direction}", stream)
        write_json(
            self.root / _RECORD,
            {
                "whens": [snapshot.when for snapshot in self.snapshots],
                "commands": self.commands,
                "seconds": self.seconds,
            },
        )

    @classmethod
    def load(cls, root: Path) -> "Captured | None":
        """What `keep` wrote into a folder; None if there is nothing."""
        record = read_json(root / _RECORD)
        if record is None:
            return None
        captured = cls(root, commands=record["commands"], seconds=record["seconds"])
        for name in MEMBERS:
            folder = root / "capture" / name
            captured.lines[name] = {
                direction: [path.read_bytes() for path in sorted(folder.glob(f"*.{direction}"))]
                for direction in ("sent", "received")
            }
        for number, when in enumerate(record["whens"]):
            folder = root / "snapshots" / f"{number:02d}"
            memory = {path.stem: path for path in sorted(folder.glob("*.memory"))}
            captured.snapshots.append(Snapshot(when, memory, folder / "home"))
        return captured

    def run(self, *words: object) -> None:
        """Run a command of `molora` to its end.

        Raises:
            SystemExit: With what it wrote, if it failed.
        """
        found = subprocess.run([MOLORA, *map(str, words)], capture_output=True, text=True)
        self._note(words)
        if found.returncode:
            raise SystemExit(found.stdout + found.stderr)

    def start(self, log: str, *words: object) -> "subprocess.Popen[bytes]":
        """Start one."""
        self._note(words)
        with (self.root / f"{log}.log").open("wb") as file:
            return subprocess.Popen([MOLORA, *map(str, words)], stdout=file, stderr=file)

    def _note(self, words: tuple[object, ...]) -> None:
        command = " ".join(str(word).replace(f"{self.root}/", "") for word in words)
        self.commands.append(f"molora {command}")

    def look(self, when: str, processes: list[psutil.Process]) -> None:
        """Keep memory and files of the coordinator; its processes stand still meanwhile."""
        folder = self.root / "snapshots" / f"{len(self.snapshots):02d}"
        folder.mkdir(parents=True)
        memory = {}
        for process in processes:
            with suppress(psutil.Error, OSError):
                name = _name_of(process)
                memory[name] = folder / f"{name}.memory"
                process.send_signal(SIGSTOP)
                try:
                    _copy_memory(process.pid, memory[name])
                finally:
                    process.send_signal(SIGCONT)
        home = folder / "home"
        for path in list_files(self.server):
            target = home / path.relative_to(self.server)
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # gone since
                shutil.copyfile(path, target)
        self.snapshots.append(Snapshot(when, memory, home))


def list_files(home: Path) -> Iterator[Path]:
    """Files of the coordinator's home, but for the base and its keys."""
    for path in sorted(home.rglob("*")):
        inside = path.relative_to(home).parts[0]
        if inside not in _LEFT_OUT and path.is_file() and not path.is_symlink():
            yield path


def _name_of(process: psutil.Process) -> str:
    words = process.cmdline()
    module = next((word for word in words if word.startswith("molora_fed.")), "serve")
    return module.rpartition(".")[2]


def _copy_memory(pid: int, path: Path) -> None:
    """Everything that a process may have written: private and shared memory, not files' code."""
    with open(f"/proc/{pid}/mem", "rb", 0) as memory, path.open("wb") as out:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, access, *_ = line.split()
            if not access.startswith("rw"):
                continue
            start, end = (int(bound, 16) for bound in span.split("-"))
            for at in range(start, end, 2**22):
                try:
                    memory.seek(at)
                    piece = memory.read(min(2**22, end - at))
                except (OSError, OverflowError, ValueError):
                    continue  # devices, and pages that are not there
                if not any(piece):
                    continue
                for page in range(0, len(piece), _PAGE):
                    if piece.count(0, page, page + _PAGE) < _PAGE:
                        out.write(piece[page : page + _PAGE])
            out.write(bytes(8))


class _Watch:
    """Takes a snapshot whenever the coordinator says that it does something else."""

    def __init__(self, captured: Captured, server: psutil.Process) -> None:
        self._captured, self._server = captured, server
        self._seen: set[str] = set()

    def processes(self) -> list[psutil.Process]:
        """The server and all that it started."""
        return [self._server, *self._server.children(recursive=True)]

    def look(self) -> None:
        """Look once at its state."""
        state = read_json(self._captured.server / "state.json") or {}
        phase, message = str(state.get("phase", "")), str(state.get("message", ""))
        what = f"{phase} {message.partition(':')[0]}"
        if phase != FUSING or what in self._seen or len(self._seen) >= MOST_SNAPSHOTS:
            return
        self._seen.add(what)
        workers = [one for one in self.processes() if COORDINATOR in one.cmdline()]
        self._captured.look(what, workers)


def _wait(until: float, what: str) -> None:
    if time.monotonic() > until:
        raise SystemExit(f"{what} within {LIMIT_SECONDS:.0f} s")
    time.sleep(0.02)


def federate(root: Path, *, privacy: str, summing: str, steps: int) -> Captured:
    """Make a cooperative, serve it, have the members join, and end when all have the result.

    Args:
        root: An empty folder.
        privacy: "pooled" or "private".
        summing: "masked" or "robust"; of private alone.
        steps: Training steps of each member.
    """
    captured = Captured(root)
    domains = ",".join(dict.fromkeys(MEMBERS.values()))
    mode = ["--privacy", privacy, *(() if privacy == "pooled" else ("--summing", summing))]
    captured.run(
        "coop", "create", "traffic", "--folder", captured.server,
        "--base", _build_base(root / "tiny-base"), "--domains", domains,
        "--expected", len(MEMBERS), "--kind", "lora", "--rank", 4, "--steps", steps,
        "--block-size", BLOCK, "--seed", SEED, *mode,
    )  # fmt: skip
    settings = [word for value in SETTINGS for word in ("--set", value)]
    captured.run("coop", "amend", captured.server, *settings)
    port = find_free_port()
    began = time.monotonic()
    until = began + LIMIT_SECONDS
    serving = captured.start(
        "serve", "serve", captured.server, "--insecure", "--port", port, "--threads", 1
    )
    joined: list[subprocess.Popen[bytes]] = []
    try:
        watch = _Watch(captured, psutil.Process(serving.pid))
        while (read_json(captured.server / "state.json") or {}).get("phase") != "RECRUITING":
            _wait(until, "the server did not start")
        captured.look("before anybody joined", watch.processes())
        with ExitStack() as stack:
            lines = {name: stack.enter_context(RecordingLine(port)) for name in MEMBERS}
            for name, domain in MEMBERS.items():
                texts = _write_texts(root / "texts" / name, name)
                joined.append(captured.start(
                    name, "join", "--server", f"127.0.0.1:{lines[name].port}", "--domain", domain,
                    "--name", name, "--data", texts, "--home", captured.home(name),
                    "--threads", 1, "--yes",
                ))  # fmt: skip
            while any(one.poll() is None for one in joined):
                watch.look()
                _wait(until, "the members did not end")
            captured.look("published", watch.processes())
            for name, line in lines.items():
                captured.lines[name] = {"sent": line.sent, "received": line.received}
    finally:
        for process in (*joined, serving):
            process.terminate()
        for process in (*joined, serving):
            process.wait(timeout=60)
    captured.seconds = time.monotonic() - began
    failed = [name for name, one in zip(MEMBERS, joined, strict=True) if one.returncode]
    if failed:
        raise SystemExit("\n".join((root / f"{name}.log").read_text() for name in failed))
    captured.keep()
    return captured
