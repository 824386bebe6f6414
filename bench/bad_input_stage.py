"""What bench/bad_input.py runs its cases on: a tiny cooperative, real commands, what they left.

Every command is the installed `molora`, a process of its own, started in the stage's folder with
relative paths. The folder is looked through before and after: a file that appeared must be whole.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError, safe_open

from molora_fed.contributions.manifest import MANIFEST_FILE, SIGNATURE_FILE, FileEntry, Manifest
from molora_fed.storage.files import hash_file, write_bytes, write_json
from molora_fed.storage.keys import load_key, sign
from molora_fed.testing import build_tiny_checkpoint

__all__ = ["DOMAINS", "STEPS", "Outcome", "Stage", "wait_until"]

DOMAINS = {"abc": "abcd", "xyz": "wxyz"}
STEPS = 60
BLOCK_SIZE = 32
LIMIT_SECONDS = 300.0
_TEMPORARY = re.compile(r"\..+\.(tmp|old)")

_NOTES = ("Training needs about ", "The report is a page that the coordinator made")
"""How lines of standard error begin that what succeeds says, too; they are not counted then."""


@dataclass
class Outcome:
    """What a command did.

    Attributes:
        case: The case of the list.
        how: What makes this one special, in a few words.
        command: The command, paths relative to the stage.
        code: Its exit code; negative is a signal.
        expected: The exit code it should have.
        message: Standard error, or what else said what is wrong.
        lines: Lines of standard error.
        new_files: Files that appeared, relative to the stage.
        problems: What was not as it should be.
        note: What was looked at besides.
    """

    case: str
    how: str
    command: str
    code: int
    expected: int
    message: str
    lines: int
    new_files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    note: str = ""


def wait_until(look: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    """Look until something true is found.

    Raises:
        TimeoutError: If it is not in time.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.02)
    raise TimeoutError(f"{what} did not happen within {seconds:.0f} s")


class Stage:
    """A folder with a tiny base, a cooperative, texts of two domains and what was trained on them.

    Args:
        root: An empty folder; whatever runs in it at the end is ended by `close`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._started: list[subprocess.Popen[str]] = []

    def prepare(self) -> None:
        """Make base, cooperative, texts, and train an adapter for each domain."""
        build_tiny_checkpoint(self.root / "base", "gpt_neox")
        build_tiny_checkpoint(self.root / "other-base", "gpt_neox", seed=1)
        (self.root / "empty").mkdir()
        create = f"coop create tiny --base base --folder coop --kind delta --steps {STEPS} "
        self.expect(create + f"--block-size {BLOCK_SIZE} --expected 1 --privacy pooled")
        for seed, (domain, letters) in enumerate(DOMAINS.items()):
            self._write_texts(self.root / f"texts-{domain}", letters, seed)
            self.expect(self.training(domain, out=f"trained-{domain}"))

    @staticmethod
    def training(domain: str, *, out: str, more: str = "") -> str:
        """Arguments that train a domain's adapter."""
        base = f"train --cooperative coop --domain {domain} --data texts-{domain} --out {out}"
        return f"{base} --threads 1 --name {domain}-1 {more}".strip()

    @staticmethod
    def _write_texts(folder: Path, letters: str, seed: int) -> None:
        """Documents of words made from a few letters, no two alike."""
        source = random.Random(seed)
        folder.mkdir()
        words = ["".join(source.choices(letters, k=source.randint(2, 6))) for _ in range(99)]
        for index in range(160):
            text = " ".join(source.choices(words, k=50))
            (folder / f"{index:03d}.txt").write_text(text, encoding="utf-8")

    def start(
        self, arguments: str, *, log: str = "", before: Callable[[], None] | None = None, **env: str
    ) -> subprocess.Popen[str]:
        """Start a command; its outputs go to `<log>.out` and `<log>.err` if a log is named."""
        command = [str(Path(sys.executable).parent / "molora"), *arguments.split()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}
        out, err = (self.root / f"{log}.out", self.root / f"{log}.err") if log else (None, None)
        with (
            (out or Path(os.devnull)).open("a") as stdout,
            (err or Path(os.devnull)).open("a") as e,
        ):
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout if log else subprocess.PIPE,
                stderr=e if log else subprocess.PIPE,
                text=True,
                preexec_fn=before,
            )
        self._started.append(process)
        return process

    def expect(self, arguments: str) -> str:
        """Run a command that must succeed, and give its standard output.

        Raises:
            RuntimeError: If it does not.
        """
        process = self.start(arguments)
        out, err = process.communicate(timeout=LIMIT_SECONDS)
        if process.returncode != 0:
            raise RuntimeError(f"`molora {arguments}` ended with {process.returncode}: {err}")
        return out

    def refuse(
        self,
        case: str,
        how: str,
        arguments: str,
        expected: int,
        *,
        says: Sequence[str] = (),
        absent: Sequence[str] = (),
        before: Callable[[], None] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Run a command that must fail with one line and leave nothing half-written.

        Args:
            case: The case of the list.
            how: What makes this one special.
            arguments: Of `molora`, separated by spaces.
            expected: Exit code.
            says: Words that must be in the message.
            absent: Paths that must not exist afterwards.
            before: Called in the process before the command starts.
            environment: Further variables.
        """
        there = self.list_files()
        process = self.start(arguments, before=before, **(environment or {}))
        _, err = process.communicate(timeout=LIMIT_SECONDS)
        outcome = self.build_outcome(
            case, how, arguments, (process.returncode, expected), err, there=there
        )
        if not err.startswith("error: "):
            outcome.problems.append("does not start with 'error: '")
        outcome.problems += [f"does not say '{word}'" for word in says if word not in err]
        outcome.problems += [f"left {path}" for path in absent if (self.root / path).exists()]
        return outcome

    def build_outcome(
        self,
        case: str,
        how: str,
        arguments: str,
        codes: tuple[int, int],
        message: str,
        *,
        there: dict[str, str],
        lines: int | None = None,
    ) -> Outcome:
        """Describe what a command did, and look through what it left.

        Args:
            case: The case of the list.
            how: What makes this one special.
            arguments: Of `molora`.
            codes: The exit code and the expected one.
            message: Standard error, or what else said what is wrong.
            there: What `list_files` found before.
            lines: Lines of standard error; those of the message if None.
        """
        code, expected = codes
        found = self.list_files()
        new = sorted(name for name, digest in found.items() if there.get(name) != digest)
        told = [line for line in message.splitlines() if code or not line.startswith(_NOTES)]
        outcome = Outcome(
            case, how, f"molora {arguments}", code, expected, self.hide_paths(message).strip(),
            len(told) if lines is None else lines, new,
        )  # fmt: skip
        known = set(there.values())
        outcome.problems += [
            f"{name}: {fault}"
            for name in new
            if found[name] not in known and (fault := self._find_fault(self.root / name))
        ]
        temporary = [name for name in new if _is_temporary(name)]
        if temporary:
            time.sleep(2)  # a server at work has such a file for a moment
        outcome.problems += [f"left {name}" for name in temporary if (self.root / name).exists()]
        if "Traceback" in message:
            outcome.problems.append("a traceback")
        if code != expected:
            outcome.problems.append(f"exit code {code} instead of {expected}")
        if outcome.lines != (code > 0):  # none from what succeeds, none from what is killed
            outcome.problems.append(f"{outcome.lines} lines on standard error")
        return outcome

    def list_files(self) -> dict[str, str]:
        """Every file below the stage with the hash of its bytes, and every folder.

        A file that is mostly holes, as large as the case may want it, is not read.
        """
        found = {}
        for folder, folders, names in os.walk(self.root):
            for name in names:
                path = Path(folder) / name
                if path.suffix in (".out", ".err") or not path.is_file():
                    continue
                with contextlib.suppress(FileNotFoundError):  # a server may be at work
                    status = path.stat()
                    if status.st_blocks * 512 < status.st_size // 2:
                        found[str(path.relative_to(self.root))] = "holes"
                        continue
                    found[str(path.relative_to(self.root))] = hash_file(path)
            for name in folders:
                found[str((Path(folder) / name).relative_to(self.root)) + "/"] = "folder"
        return found

    @staticmethod
    def _find_fault(path: Path) -> str:
        """Why a file is not whole; empty if it is."""
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".safetensors":
                with safe_open(path, "np") as file:
                    file.keys()
            elif path.name == "ledger.db":
                with closing(sqlite3.connect(path)) as database:
                    state = database.execute("pragma integrity_check").fetchone()[0]
                return "" if state == "ok" else state
            elif "blobs" in path.parts and len(path.name) == 64:
                return "" if hash_file(path) == path.name else "not the bytes of its name"
        except (ValueError, SafetensorError, OSError) as error:
            return str(error)
        return ""

    def hide_paths(self, text: str) -> str:
        """A text with paths relative to the stage."""
        return text.replace(f"{self.root}/", "").replace(str(self.root), ".")

    def copy(self, source: str, target: str) -> Path:
        """Copy a folder of the stage."""
        shutil.copytree(self.root / source, self.root / target)
        return self.root / target

    def sign_again(self, contribution: Path, **changes: Any) -> None:
        """Sign a contribution as it lies there now, as its contributor could."""
        manifest = Manifest.model_validate_json((contribution / MANIFEST_FILE).read_bytes())
        adapter = {
            name: FileEntry(sha256=hash_file(path), bytes=path.stat().st_size)
            for name in manifest.adapter_files
            for path in [contribution / "adapter" / name]
        }
        changed = manifest.model_copy(update={"adapter_files": adapter, **changes})
        write_json(contribution / MANIFEST_FILE, changed.model_dump(mode="json"))
        key = load_key(contribution.parent / "key.pem")
        signature = sign(key, changed.canonical) + "\n"
        write_bytes(contribution / SIGNATURE_FILE, signature.encode())

    def find_processes(self, folder: str) -> list[psutil.Process]:
        """Living processes that work in a folder of the stage."""
        where, found = str(self.root / folder), []
        for process in psutil.process_iter():
            try:
                words = [*process.cmdline(), *process.environ().values()]
                if process.status() != psutil.STATUS_ZOMBIE and any(where in w for w in words):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def close(self) -> None:
        """End what still runs, asking first."""
        for process in self._started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._started:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_temporary(name: str) -> bool:
    return any(_TEMPORARY.fullmatch(part) for part in Path(name).parts)
