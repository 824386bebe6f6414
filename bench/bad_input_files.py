"""Cases of bench/bad_input.py that end by themselves: files, names, addresses, a full disk."""

import json
import math
import os
import pickle
import resource
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from bad_input_stage import Outcome, Stage
from safetensors.numpy import load_file, save_file

from molora_fed.contributions.manifest import WEIGHTS_FILE

__all__ = ["find_free_port", "run_adapter_cases", "run_other_cases"]

Tamper = Callable[[Path], None]


class _Unsafe:
    """Unpickled, it makes a folder: a reader that unpickles is found out."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return (os.mkdir, ("unpickled",))


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _poison(path: Path) -> None:
    """In place: the file keeps its size and its header."""
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(struct.pack("<f", math.nan))


def _add_tensor(path: Path) -> None:
    save_file({**load_file(path), "backdoor.weight": np.ones((2, 2), np.float32)}, path)


def _pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Unsafe()))


def _claim_too_much(path: Path) -> None:
    """A header that names more bytes than the file has: nothing may be allocated for them."""
    entry = {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}
    header = json.dumps({"a.weight": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


_ADAPTERS: dict[str, tuple[Tamper, int, tuple[str, ...]]] = {
    # case: how to make it, exit code when joining with it, what the message must name
    "truncated safetensors": (_truncate, 20, ("adapter_model.safetensors",)),
    "NaN tensor": (_poison, 21, ()),
    "extra tensor": (_add_tensor, 20, ("backdoor",)),
    "pickle renamed to .safetensors": (_pickle, 20, ("safetensors",)),
    "header larger than its file": (_claim_too_much, 20, ("safetensors",)),
}


def run_adapter_cases(stage: Stage, join: str) -> Iterator[Outcome]:
    """Adapters that were tampered with: as they are, signed again, and given to `molora join`.

    Args:
        stage: The stage.
        join: Arguments of `molora join` at a running server, but for the adapter.
    """
    for number, (case, (tamper, code, says)) in enumerate(_ADAPTERS.items()):
        changed, signed = f"changed-{number}", f"signed-{number}"
        for name in (changed, signed):
            stage.copy("trained-abc", name)
            for folder in ("contribution/adapter", "adapter"):
                tamper(stage.root / name / folder / WEIGHTS_FILE)
        stage.sign_again(stage.root / signed / "contribution")
        for how, name, expected in (
            ("changed after it was signed", changed, 20),
            ("signed by its contributor", signed, 22),
        ):
            yield _fuse(stage, case, how, name, expected, () if expected == 20 else says)
        arguments = f"{join} --adapter {signed}"
        yield stage.refuse(
            case, "given to join", arguments, code, says=says, absent=["joined/contribution"]
        )
        shutil.rmtree(stage.root / changed)
        shutil.rmtree(stage.root / signed)


def _fuse(
    stage: Stage, case: str, how: str, folder: str, expected: int, says: tuple[str, ...]
) -> Outcome:
    """Fuse a contribution with a good one, in a copy of the cooperative."""
    stage.copy("coop", "receiving")
    outcome = stage.refuse(
        case, how, f"fuse --cooperative receiving {folder} trained-xyz --out out", expected,
        says=("abc-1", *says) if expected == 22 else says, absent=["out", "unpickled"],
    )  # fmt: skip
    shutil.rmtree(stage.root / "receiving")
    return outcome


def run_other_cases(stage: Stage) -> Iterator[Outcome]:
    """Base, charter, names, addresses, text and disk."""
    yield from _run_base_cases(stage)
    yield from _run_charter_cases(stage)
    yield from _run_address_cases(stage)
    for how, arguments in (
        ("train", "train --cooperative coop --domain abc --data empty --out out"),
        ("join", "join --server 127.0.0.1:1 --domain abc --data empty --home out --yes"),
    ):
        outcome = stage.refuse("empty data folder", how, arguments, 12, says=("empty",))
        outcome.problems += [
            f"left {name}" for name in outcome.new_files if name.endswith((".json", ".pem"))
        ]
        yield outcome
        shutil.rmtree(stage.root / "out", ignore_errors=True)
    yield _run_small_files_case(stage)


def _run_base_cases(stage: Stage) -> Iterator[Outcome]:
    case = "wrong base fingerprint"
    arguments = "train --cooperative coop --base other-base --domain abc --data texts-abc --out out"
    yield stage.refuse(case, "trained on another base", arguments, 13, absent=["out"])
    folder = stage.copy("trained-abc", "signed")
    stage.sign_again(folder / "contribution", base_weights="0" * 64)
    yield _fuse(
        stage, case, "contribution of another base", "signed", 22, ("base-fingerprint", "0000")
    )
    shutil.rmtree(folder)


def _run_charter_cases(stage: Stage) -> Iterator[Outcome]:
    case = "unknown charter key"
    charter = stage.copy("coop", "surprising") / "cooperative.toml"
    text = charter.read_text(encoding="utf-8")
    charter.write_text(text.replace("[amendment]\n", "[amendment]\nsurprise = 1\n"), "utf-8")
    for arguments in (
        "train --cooperative surprising --domain abc --data texts-abc --out out",
        "fuse --cooperative surprising trained-abc --out out",
        f"serve surprising --port {find_free_port()}",
    ):
        yield stage.refuse(
            case, arguments.split()[0], arguments, 11, says=("surprise",), absent=["out"]
        )
    shutil.rmtree(charter.parent)
    arguments = "coop create other --base base --folder out --router evidense"
    yield stage.refuse(
        "unknown router", "coop create", arguments, 61,
        says=("evidense", "Did you mean", "'evidence'"), absent=["out"],
    )  # fmt: skip


def _run_address_cases(stage: Stage) -> Iterator[Outcome]:
    arguments = f"join --server 127.0.0.1:{find_free_port()} --domain abc --data texts-abc"
    yield stage.refuse(
        "server unreachable", "nobody listens", f"{arguments} --home out --yes", 51,
        absent=["out/training", "out/contribution"],
    )  # fmt: skip
    shutil.rmtree(stage.root / "out", ignore_errors=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        yield stage.refuse(
            "port taken", "another program listens", f"serve coop --port {port}", 52,
            says=(str(port),),
        )  # fmt: skip


def _run_small_files_case(stage: Stage) -> Outcome:
    """No file of this process may have more than 100 kB: the corpus does not fit."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    outcome = stage.refuse(
        "disk full during training", "file-size limit of 100 kB",
        stage.training("abc", out="out"), 14, absent=["out/contribution", "out/adapter"],
        before=limit,
    )  # fmt: skip
    shutil.rmtree(stage.root / "out", ignore_errors=True)
    return outcome


def find_free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
