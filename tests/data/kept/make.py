"""Makes the kept files in a new folder, with the code of 87873ee: `python make.py FOLDER`.

Whoever runs it with later code gets later files, which prove nothing: keep those that are here.
"""

import contextlib
import io
import json
import os
import platform
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import tomli_w
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from molora_cli.main import run
from molora_fed.contributions.amendments import SignedAmendment
from molora_fed.contributions.keys import load_key, sign
from molora_fed.files import canonical_json

from molora_fed.cooperative import open_cooperative
from molora_fed.errors import AdmissionError
from molora_fed.testing.models import build_tiny_checkpoint

HERE = Path(__file__).resolve()
WORDS = {"abc": "abcd", "xyz": "wxyz", "lmn": "klmn"}
SIZES = (
    "--block-size", "32", "--frozen-depth", "1", "--rank", "2", "--steps", "12",
    "--privacy", "pooled",
)  # fmt: skip
CONTRIBUTORS = {
    # name: (domain, seed of its text, options of `molora train`)
    "abc-lora": ("abc", 1, ["--kind", "lora"]),
    "xyz-svd": ("xyz", 2, ["--kind", "svd"]),
    "lmn-delta": ("lmn", 3, ["--kind", "delta"]),
    "abc-int8": ("abc", 4, ["--kind", "svd", "--option", "precision=int8"]),
    "xyz-gone": ("xyz", 5, ["--kind", "lora"]),
    "abc-late": ("abc", 6, ["--kind", "lora"]),
    "abc-stranger": ("abc", 7, ["--kind", "lora"]),
}
SMALL = ("abc-lora", "xyz-svd", "abc-int8")
ROUTERS = {
    # folder of the bundle: settings of its amendment
    "evidence-zero": ["fusion.router=evidence-zero"],
    "evidence-hidden": ["fusion.router=evidence-hidden"],
    "evidence-share": ["fusion.router=evidence-share"],
    "linear": ["fusion.router=linear", "fusion.options={steps = 20}"],
    "linear-logit": ["fusion.router=linear", "fusion.mixture=logit"],
    "linear-noncausal": ["fusion.router=linear-noncausal", "fusion.mixture=probability"],
    "mlp-top-2": ["fusion.router=mlp", "fusion.top_k=2"],
    "evidence-top-1": ["fusion.router=evidence", "fusion.options={}", "fusion.top_k=1"],
    "hard-logit": [
        "fusion.router=hard",
        "fusion.options={steps = 20}",
        "fusion.top_k=none",
        "fusion.mixture=logit",
    ],
    "dispatch": [
        "fusion.router=dispatch",
        "fusion.options={read_tokens = 4}",
        "fusion.mixture=probability",
    ],
    "statistics": ["fusion.router=statistics", "fusion.options={}"],
    "uniform": ["fusion.router=uniform"],
}
POPULATION = (
    "fusion.mode=population",
    "population.generations=1",
    "population.start_steps=103",
    "population.steps=4",
    "population.slots=4",
    "population.rank=2",
    "population.filling=fresh",
    'population.lifecycle=[{name = "death", options = {threshold = 9.0, patience = 1, '
    'min_age = 1}}, {name = "slot-reallocation"}, {name = "inheritance"}]',
)
UNCHANGED = {"base", "blobs", "bank", "fused", "keys", "report", "states", "trace"} | {
    "result.json",
    "forecasts.json",
}
"""What an evolution does not change in a cooperative, and what it can make again."""
PROMPTS = ("abcd dcba ", "wxyz zyxw lmn")
LIBRARIES = ("accelerate", "numpy", "peft", "torch", "transformers")
"""With Python and the CPU, what decides the last bits of figures and of trained bytes."""
CASCADE = """
[cascade]
probe = "base"
members = ["abc", "xyz", "fused"]
temperature = 1.0
max_new_tokens = 4
judge = "likelihood"
[cascade.judge_options]
model = "fused"
[models.base]
kind = "base"
path = "../cooperative"
[models.abc]
kind = "specialist"
cooperative = "../cooperative"
contributor = "abc-lora"
[models.xyz]
kind = "specialist"
path = "../contributions/xyz-svd/adapter"
base = "../cooperative/base"
[models.fused]
kind = "fused"
path = "../bundles/linear"
base = "../cooperative/base"
"""


def molora(*arguments: object, code: int = 0) -> tuple[str, str]:
    """Run a command in this process; its standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        ended = run([str(argument) for argument in arguments])
    if ended != code:
        raise SystemExit(f"{arguments}: {ended}\n{out.getvalue()}\n{err.getvalue()}")
    return out.getvalue(), err.getvalue()


def settings(texts: object) -> list[str]:
    """Options of `molora coop amend`."""
    return [part for text in texts for part in ("--set", text)]


def write_key(path: Path, number: int) -> Path:
    """A private key anybody can make again; no private key is kept."""
    key = ec.derive_private_key(number, ec.SECP384R1())
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pem)
    path.chmod(0o600)
    return path


def write_text(path: Path, letters: str, seed: int, count: int) -> Path:
    """Documents of words made from a few letters, no two alike; one JSON line each."""
    source = random.Random(seed)
    words = ["".join(source.choices(letters, k=source.randint(2, 6))) for _ in range(99)]
    lines = [json.dumps({"text": " ".join(source.choices(words, k=12))}) for _ in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def kill_while(pattern: str, writes: int, *arguments: object) -> None:
    """Run a command in a process that dies `writes` writes after a file of that name is there."""
    command = [sys.executable, str(HERE), "--die", pattern, str(writes), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode != -signal.SIGKILL:
        raise SystemExit(f"{arguments}: was not killed\n{ended.stdout}\n{ended.stderr}")


def die_and_run(pattern: str, writes: str, *arguments: str) -> None:
    """What `kill_while` runs."""
    left, real_fsync = int(writes), os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal left
        left -= any(Path().rglob(pattern))
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real_fsync(descriptor)

    os.fsync = fsync
    run(arguments)


def train(name: str, cooperative: Path, out: Path) -> list[object]:
    """Arguments of `molora train` of one contributor."""
    domain, seed, more = CONTRIBUTORS[name]
    key = write_key(Path("keys") / f"{name}.pem", 100 + seed)
    text = write_text(Path("texts") / f"{name}.jsonl", WORDS[domain], seed, 160)
    wanted = ["--cooperative", cooperative, "--domain", domain, "--data", text, "--out", out]
    return ["train", *wanted, "--name", name, "--key", key, "--threads", 1, *more]


def add_old_amendment(folder: Path) -> None:
    """Sign an amendment as an earlier version would have: with only some of today's keys."""
    cooperative = open_cooperative(folder)
    whole = cooperative.charter.amendment.model_dump(mode="json")
    old = {key: whole[key] for key in ("domains", "expected", "seed", "samples", "training")}
    old |= {"number": whole["number"] + 1, "admission": {"max_loss_rise": 9.0}}
    old["fusion"] = {"base_expert": True, "collapse_nats": 0.05}
    identity = cooperative.charter.identity_hash
    text = canonical_json({"charter_identity": identity, "amendment": old})
    signed = SignedAmendment(
        identity, canonical_json(old).decode(), sign(load_key(cooperative.key_path), text)
    )
    with cooperative.open_ledger() as ledger:
        ledger.add_amendment(signed, actor="make.py")
    file = folder / "cooperative.toml"
    before, _, _ = file.read_text().partition("\n[amendment]")
    del old["training"]["learning_rate"]  # TOML has no null
    file.write_text(before + "\n" + tomli_w.dumps({"amendment": old}))


def make(home: Path) -> None:
    """Everything, below the working directory; what is kept goes to `home`."""
    here, cooperative = Path(), Path("cooperative")
    build_tiny_checkpoint(Path("tiny"), "gpt_neox")
    write_key(cooperative / "keys" / "coordinator.pem", 1)
    molora("coop", "create", "kept", "--base", "tiny", "--folder", cooperative, *SIZES)
    molora("coop", "create", "other", "--base", "tiny", "--folder", "other", *SIZES)
    small = ["samples.calibration=16", "samples.admission=4", "samples.held_out=8"]
    small += ["training.validate_every=4", "fusion.router=linear", "admission.max_loss_rise=9.0"]
    molora("coop", "amend", cooperative, *settings(small))
    molora("coop", "amend", "other", *settings(small))
    add_old_amendment(cooperative)
    trained = {name: here / "trained" / name for name in CONTRIBUTORS}
    for name, folder in trained.items():
        molora(*train(name, here / "other" if name == "abc-stranger" else cooperative, folder))
    del trained["abc-late"]
    stranger = trained.pop("abc-stranger")

    # The ledger: five admitted, one of them withdrawn, and one rejected.
    molora("coop", "admit", cooperative, *trained.values())
    molora("coop", "admit", cooperative, stranger, code=AdmissionError.exit_code)
    molora("coop", "withdraw", cooperative, "xyz-gone", "--reason", "for the record")
    molora("fuse", "--cooperative", cooperative)
    molora("trace", "record", cooperative)
    keep(cooperative, home, "cooperative", leave={"bank", "report", "keys"})
    for name in sorted({*trained, "abc-late"} - {"xyz-gone"}):
        keep(here / "trained" / name / "contribution", home, f"contributions/{name}")

    # An evolution, and one that was killed while its slots adapted.
    shutil.copytree(cooperative, "before")
    molora("coop", "amend", cooperative, *settings(POPULATION))
    shutil.copytree(cooperative, "killed/cooperative")
    molora("evolve", cooperative)
    keep(cooperative, home, "evolved", leave=UNCHANGED)
    kill_while("adaptation.safetensors", 3, "evolve", "killed/cooperative")
    keep(here / "killed/cooperative", home, "evolving", leave=UNCHANGED)
    shutil.rmtree(cooperative)
    shutil.move("before", cooperative)

    # A training that was killed between two checkpoints.
    kill_while("checkpoint.safetensors", 3, *train("abc-late", cooperative, here / "training"))
    keep(here / "training", home, "training/abc-late")
    (home / "texts").mkdir()
    shutil.copy(here / "texts" / "abc-late.jsonl", home / "texts")

    # A bundle of every router, with and without top-k, of both mixtures.
    molora("coop", "amend", cooperative, *settings(["fusion.compare=", "fusion.merges="]))
    chosen = [trained[name] for name in SMALL]
    for name, wanted in ROUTERS.items():
        molora("coop", "amend", cooperative, *settings([*wanted, "fusion.fallback="]))
        out = here / "bundles" / name
        molora("fuse", "--cooperative", cooperative, *chosen, "--out", out)
        keep(out / "fused", home, f"bundles/{name}/fused")


def make_cascade(home: Path) -> None:
    """A run of a cascade; paths are those of the kept files, which models are read from."""
    folder = home / "cascade"
    folder.mkdir()
    (folder / "cascade.toml").write_text(CASCADE.lstrip())
    tasks = [
        {"id": f"t{n}", "family": "f", "prompt": f"abc {n} ", "extractor": "normalised-text"}
        for n in range(4)
    ]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    key = write_key(Path("keys/cascade.pem"), 2).resolve()
    molora(
        *("cascade", "run", folder / "cascade.toml", "--tasks", folder / "tasks.jsonl"),
        *("--out", folder / "run", "--key", key, "--no-times"),
    )
    molora("trace", "prove", folder / "run/trace", "--record", 3, "--out", folder / "proof.json")
    for lock in folder.rglob(".*.lock"):
        lock.unlink()


def keep(source: Path, home: Path, name: str, *, leave: object = frozenset()) -> None:
    """Copy a folder, without locks and what is left out, the ledger in one file."""
    for ledger in source.glob("ledger.db"):
        with contextlib.closing(sqlite3.connect(ledger)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    ignored = shutil.ignore_patterns(*leave, "*.lock", ".lock", ".*.tmp", "ledger.db-*")
    shutil.copytree(source, home / name, ignore=ignored)


def record(home: Path) -> None:
    """What commands say of the kept models."""
    evaluation = write_text(home / "texts" / "own.jsonl", "abcwxy", 9, 4)
    recorded = {"made": {name: version(name) for name in LIBRARIES}}
    recorded["made"] |= {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "hardware": torch.backends.cpu.get_cpu_capability(),
    }
    models = {name: home / "bundles" / name for name in ROUTERS}
    models["cooperative"] = home / "cooperative"
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "cooperative"
        shutil.copytree(home / "cooperative", whole, ignore=shutil.ignore_patterns("fused"))
        shutil.copytree(home / "evolved", whole, dirs_exist_ok=True)
        models["evolved"] = whole
        for name, model in models.items():
            out, _ = molora("evaluate", model, "--data", f"own={evaluation}", "--block-size", 32)
            recorded[name] = {"losses": re.findall(r"\d+\.\d+", out), "texts": []}
            for prompt in () if name == "linear-noncausal" else PROMPTS:
                out, err = molora("generate", model, "--prompt", prompt, "--max-new-tokens", 24)
                gates = {n: float(v) for n, v in re.findall(r"([\w-]+) (\d\.\d+)", err)}
                recorded[name]["texts"].append({"prompt": prompt, "text": out, "gates": gates})
        out, _ = molora("evolve", "lineage", whole)
        recorded["lineage"] = out
    trace = home / "cascade" / "run" / "trace"
    out, _ = molora("trace", "verify", trace, "--key", home / "cascade" / "run" / "public.pem")
    recorded["cascade"] = {"root": re.findall(r"root (\w{64})", out)[0]}
    home.joinpath("recorded.json").write_text(json.dumps(recorded, indent=1) + "\n")


def main() -> None:
    """Make everything in a new folder."""
    if sys.argv[1] == "--die":
        die_and_run(*sys.argv[2:])
        return
    home = Path(sys.argv[1]).resolve()
    home.mkdir()
    print(platform.platform())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make(home)
        make_cascade(home)
        record(home)
    for left in home.rglob("ledger.db-*"):  # of readers; nothing is in them
        left.unlink()


if __name__ == "__main__":
    main()
