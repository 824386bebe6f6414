"""A whole federation on a real base, invitation to report: steps, losses, bytes on the wire.

    make smollm2
    python bench/real_federation.py --base bases/smollm2 --gguf FILE.gguf     # as root, on Linux

Each side is a network namespace and a user of its own. The coordinator creates a cooperative on the
base, in bfloat16, and serves it. Three contributors train LoRA adapters on what Python brings:
alice has the checkpoint (first a copy with one changed value, to be refused), bob the GGUF file it
was made of, carol nothing. Ends with 1 if a byte of the checkpoint reached alice or bob, the
wrong copy was not refused by the tensor that differs, or the report is not the same on all sides.
"""

import argparse
import ast
import json
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from real_federation_page import build_page
from safetensors.torch import load_file, save_file

from molora_fed.federation.messages import Shipment, describe_folder, list_describing, plan_parts
from molora_fed.federation.traffic import Seen, read_traffic
from molora_fed.storage.files import write_bytes
from molora_fed.storage.keys import build_public_pem, key_fingerprint, load_key

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from host_helpers import MOLORA, Host, linked_hosts  # noqa: E402

OUT = Path("docs/results/real_federation.md")
PORT = 8_080
STEPS, RANK, BLOCK = 16, 8, 64
MEMBERS = {"alice": "sources", "bob": "docstrings", "carol": "reference"}
SETTINGS = (
    "dtype=bfloat16", "training.batch=4", "training.learning_rate=0.0005",
    "training.validate_every=8", "samples.calibration=12", "samples.admission=4",
    "samples.held_out=12", "fusion.merges=[]",
)  # fmt: skip
CHANGED = "mlp.down_proj.weight"
DOCUMENTS, CHARACTERS = 64, 2_000
LIMIT_SECONDS = 3_600.0


def read_docstrings(source: str) -> str:
    """All docstrings of a module."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def write_texts(folder: Path, domain: str) -> Path:
    """Documents of a domain; sources and docstrings are of different modules."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if domain == "reference":
        texts = [topics[name] for name in sorted(topics)]
    elif domain == "sources":
        texts = [path.read_text(encoding="utf-8") for path in paths[::2]]
    else:
        texts = [read_docstrings(path.read_text(encoding="utf-8")) for path in paths[1::2]]
    cut = [text[at : at + CHARACTERS] for text in texts for at in range(0, len(text), CHARACTERS)]
    folder.mkdir()
    for number, text in enumerate([text for text in cut if len(text) > 500][:DOCUMENTS]):
        write_bytes(folder / f"{number:03d}.txt", text.encode())
    return folder


def copy_base(source: Path, target: Path) -> Path:
    """The checkpoint, without what says where it comes from."""
    return Path(shutil.copytree(source, target, ignore=shutil.ignore_patterns("base.json")))


def change_one_value(folder: Path) -> str:
    """Another number at one place of one tensor in the middle; the tensor's name."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(name for name in weights if name.endswith(CHANGED))
    name = names[len(names) // 2]
    weights[name][3, 5] += 0.25
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return name


@dataclass
class Joined:
    """A `molora join` under way.

    Attributes:
        host: Where it runs.
        home: The contributor's home.
        process: The command.
        seconds: How long it took; 0 while it runs.
    """

    host: Host
    home: Path
    process: "subprocess.Popen[bytes]"
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    @property
    def key(self) -> str:
        """Fingerprint of the contributor's key."""
        return key_fingerprint(build_public_pem(load_key(self.home / "key.pem")))

    def read_log(self, kind: str) -> str:
        """What it wrote to standard output, or to standard error."""
        return (self.host.home / f"join.{kind}").read_text(encoding="utf-8")


@dataclass
class Federation:
    """The coordinator's side, and what was measured.

    Attributes:
        server: The coordinator's host.
        coop: Its folder.
        steps: What was done, and in how many seconds.
        wire: Bytes that reached and left each member, by name.
    """

    server: Host
    coop: Path
    steps: list[tuple[str, float]] = field(default_factory=list)
    wire: dict[str, tuple[int, int]] = field(default_factory=dict)

    def timed(self, what: str, do: Callable[[], Any]) -> Any:
        """Do one step, and note how long it took."""
        began = time.monotonic()
        done = do()
        self.note(what, time.monotonic() - began)
        return done

    def note(self, what: str, seconds: float) -> None:
        """Note how long a step took."""
        self.steps.append((what, seconds))
        print(f"{what}: {seconds:.0f} s", flush=True)

    def create(self, base: Path) -> None:
        """Make the cooperative, and start to serve it."""
        own = self.server.own(copy_base(base, self.server.home / "base"))
        self.timed("`molora coop create`", lambda: self.server.run(
            MOLORA, "coop", "create", "real", "--folder", self.coop, "--base", own,
            "--domains", ",".join(MEMBERS.values()), "--expected", len(MEMBERS),
            "--kind", "lora", "--rank", RANK, "--steps", STEPS, "--block-size", BLOCK,
            "--privacy", "pooled",
        ))  # fmt: skip
        settings = [word for value in SETTINGS for word in ("--set", value)]
        self.timed(
            "`molora coop amend`",
            lambda: self.server.run(MOLORA, "coop", "amend", self.coop, *settings),
        )

    def serve(self) -> "subprocess.Popen[bytes]":
        """Start `molora serve`, and wait until members can be invited."""
        address = f"{self.server.address}:{PORT}"
        with (self.server.home / "serve.log").open("wb") as log:
            process = subprocess.Popen(
                self.server.wrap(MOLORA, "serve", self.coop, "--address", address, "--threads", 1),
                cwd=self.server.home, stdout=log, stderr=log,
            )  # fmt: skip
        began = time.monotonic()
        while not (self.coop / "address.json").exists():
            if process.poll() is not None or time.monotonic() - began > LIMIT_SECONDS:
                raise SystemExit((self.server.home / "serve.log").read_text())
            time.sleep(0.1)
        return process

    def invite(self, name: str) -> str:
        """An invitation's line."""
        words = ("coop", "invite", self.coop, "--name", name, "--domain", MEMBERS[name])
        return self.server.run(MOLORA, *words).strip()

    def seen(self, joined: Joined) -> Seen:
        """Bytes of files that the server counts of a member."""
        return read_traffic(self.coop / "mail" / "traffic.json").get(joined.key, Seen(last=0.0))


def join(host: Host, name: str, *words: object) -> Joined:
    """Start `molora join`."""
    home = host.home / f"contributor-{MEMBERS[name]}"
    command = [MOLORA, "join", *words, "--data", host.home / "texts", "--threads", 1, "--yes"]
    with (
        (host.home / "join.out").open("wb") as out,
        (host.home / "join.err").open("wb") as err,
    ):
        process = subprocess.Popen(host.wrap(*command), cwd=host.home, stdout=out, stderr=err)
    return Joined(host, home, process)


def wait_for(*running: Joined) -> None:
    """Wait for the end of all.

    Raises:
        SystemExit: If they take too long.
    """
    began = time.monotonic()
    while left := [one for one in running if not one.seconds]:
        for one in left:
            if one.process.poll() is not None:
                one.seconds = time.monotonic() - one.began
        if time.monotonic() - began > LIMIT_SECONDS:
            raise SystemExit(f"{len(left)} contributors did not end: {left[0].read_log('out')}")
        time.sleep(0.2)


def measure_phases(home: Path, contributor: str) -> dict[str, float]:
    """Seconds in each phase, by a side's log of events; the last has no end."""
    spent: dict[str, float] = {}
    before: tuple[str, datetime] | None = None
    for line in (home / "logs" / "events.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event.get("contributor", "") != contributor or "phase" not in event:
            continue
        now = (event["phase"], datetime.fromisoformat(event["time"]))
        if before is not None:
            spent[before[0]] = spent.get(before[0], 0.0) + (now[1] - before[1]).total_seconds()
        before = now
    return spent


def read_peak(home: Path) -> int:
    """Largest memory of a side's worker, bytes."""
    return int(json.loads((home / "usage.json").read_text())["peak_bytes"])


def read_peaks(host: Host) -> dict[str, int]:
    """Largest memory of each module that runs on a host, bytes."""
    found: dict[str, int] = {}
    pids = subprocess.run(
        ["ip", "netns", "pids", host.namespace], capture_output=True, text=True, check=True
    )
    for pid in pids.stdout.split():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        status = Path(f"/proc/{pid}/status").read_text()
        if "VmHWM" not in status:  # it has just ended
            continue
        module = next((word for word in words if word.startswith("molora_fed.")), "molora serve")
        peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        found[module] = max(found.get(module, 0), peak)
    return found


def compare_reports(coop: Path, joined: list[Joined]) -> tuple[int, bool]:
    """Files of the report, and whether all sides have the same bytes."""
    own = describe_folder(coop / "report")
    return len(own.files), all(
        describe_folder(one.home / "result" / "report") == own for one in joined
    )


def run(base: Path, gguf: Path | None) -> dict[str, Any]:
    """The whole federation; what was found."""
    with linked_hosts("server", *MEMBERS) as hosts:
        server, people = hosts[0], dict(zip(MEMBERS, hosts[1:], strict=True))
        federation = Federation(server, server.home / "coop")
        for name, host in people.items():
            host.own(write_texts(host.home / "texts", MEMBERS[name]))
        right = {"alice": copy_base(base, people["alice"].home / "base")}
        wrong = copy_base(base, people["alice"].home / "wrong")
        changed = change_one_value(wrong)
        bob = people["bob"].home
        right["bob"] = Path(shutil.copy(gguf, bob)) if gguf else copy_base(base, bob / "base")
        for host in people.values():
            host.own(host.home)
        federation.create(base)
        serving = federation.serve()
        found = refuse(federation, people["alice"], wrong)
        began = time.monotonic()
        joined = {}
        for name, host in people.items():
            own = ("--base", right[name]) if name in right else ()
            home = ("--home", found["refused"].home) if name == "alice" else ()
            invitation = () if name == "alice" else (federation.invite(name),)
            joined[name] = join(host, name, *invitation, *home, *own)
        wait_for(*joined.values())
        federation.note("three contributors, join to fused model", time.monotonic() - began)
        for name, one in joined.items():
            print(name, one.process.returncode, one.read_log("err"), flush=True)
            federation.wire[name] = one.host.read_wire()
        found["peaks"] = read_peaks(server)
        serving.terminate()
        found["codes"] = {
            **{name: one.process.returncode for name, one in joined.items()},
            "serve": serving.wait(timeout=LIMIT_SECONDS),
        }
        found |= look_at_result(federation, list(joined.values()))
        found |= measure_bytes(federation, joined)
        found |= {"steps": federation.steps, "wire": federation.wire, "changed": changed}
        found["training"] = (
            f"LoRA of rank {RANK}, {STEPS} steps of 4 blocks of {BLOCK} tokens, in bfloat16 "
            f"(`{' '.join(SETTINGS)}`)"
        )
        del found["refused"]
        return found


def refuse(federation: Federation, host: Host, wrong: Path) -> dict[str, Any]:
    """Alice joins with a copy that has one other value."""
    refused = join(host, "alice", federation.invite("alice"), "--base", wrong)
    wait_for(refused)
    federation.note("alice with the wrong copy, join to refusal", refused.seconds)
    in_bytes, out_bytes = host.read_wire()
    return {
        "refused": refused,
        "refusal": {
            "code": refused.process.returncode,
            "lines": refused.read_log("err").replace(f"{host.home}/", "").splitlines(),
            "wire": (in_bytes, out_bytes),
            "contribution": (refused.home / "contribution").exists(),
            "base": (refused.home / "base").exists(),
        },
    }


def look_at_result(federation: Federation, joined: list[Joined]) -> dict[str, Any]:
    """Losses, phases, memory, and the report on all sides."""
    result = json.loads((federation.coop / "report" / "report.json").read_text())
    num_files, same = compare_reports(federation.coop, joined)
    prompt = ("--prompt", "def read(path):", "--max-new-tokens", 12)
    bob = joined[1]
    text = federation.timed(
        "bob: `molora generate`, 12 tokens",
        lambda: bob.host.run(
            MOLORA, "generate", bob.home / "result" / "fused", *prompt, timeout=900
        ),
    )
    return {
        "result": result,
        "report": {"files": num_files, "same": same},
        "phases": {
            "server": measure_phases(federation.coop, ""),
            **{one.host.home.name: measure_phases(one.home, one.host.home.name) for one in joined},
        },
        "worker peaks": {
            "server": read_peak(federation.coop),
            **{one.host.home.name: read_peak(one.home) for one in joined},
        },
        "text": text.strip(),
    }


def measure_bytes(federation: Federation, joined: dict[str, Joined]) -> dict[str, Any]:
    """What of the files that the server counts was which, by member."""
    base = describe_folder(federation.coop / "base")
    describing = list_describing(base)
    checkpoint = Shipment(tuple(entry for entry in base.files if entry not in describing.files))
    (folder,) = (federation.coop / "mail" / "outbox" / "result").iterdir()
    result = sum(part.length for part in plan_parts(describe_folder(folder)))
    members = {}
    for name, one in joined.items():
        seen = federation.seen(one)
        members[name] = {
            "sent": seen.sent,
            "received": seen.received,
            "checkpoint": seen.sent - describing.num_bytes - result,
        }
    return {
        "base": {
            "bytes": checkpoint.num_bytes,
            "files": len(checkpoint.files),
            "parts": len(plan_parts(checkpoint)),
            "describing": describing.num_bytes,
        },
        "result bytes": result,
        "members": members,
    }


def find_problems(found: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    base, refusal, members = found["base"], found["refusal"], found["members"]
    problems = [
        f"{name}: {members[name]['checkpoint']} bytes of the checkpoint"
        for name in ("alice", "bob")
        if members[name]["checkpoint"] != 0
        or found["wire"][name][0] > found["result bytes"] + base["bytes"] / 10
    ]
    if members["carol"]["checkpoint"] != base["bytes"]:
        problems.append(f"carol: {members['carol']['checkpoint']} bytes of the checkpoint")
    if refusal["code"] != 13 or len(refusal["lines"]) != 1 or refusal["contribution"]:
        problems.append(f"the wrong copy: {refusal}")
    elif f"'{found['changed']}'" not in refusal["lines"][0] or refusal["base"]:
        problems.append(f"the refusal: {refusal}")
    if not found["report"]["same"]:
        problems.append("the report is not the same on all sides")
    if any(found["codes"][name] for name in MEMBERS):
        problems.append(f"exit codes: {found['codes']}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, default=Path("bases/smollm2"), help="a checkpoint")
    parser.add_argument("--gguf", type=Path, help="the file it was made of; bob joins with it")
    parser.add_argument("--out", type=Path, default=OUT, help="Markdown page to write")
    given = parser.parse_args()
    found = run(given.base.resolve(), given.gguf)
    card = given.base / "base.json"
    found["base"]["id"] = json.loads(card.read_text())["id"] if card.exists() else given.base.name
    found["bob's copy"] = "the GGUF file" if given.gguf else "a folder"
    problems = find_problems(found)
    command = f"python bench/real_federation.py --base {given.base}"
    command += f" --gguf {given.gguf.name}" if given.gguf else ""
    write_bytes(given.out, build_page(found, problems, command).encode())
    print("\n".join(problems) or "as it should be")
    return int(bool(problems))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
