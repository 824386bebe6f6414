"""Runs commands in this process; a tiny cooperative with two trained contributions."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from molora_cli.main import run


@dataclass(frozen=True)
class Ran:
    """What a command left."""

    code: int
    out: str
    err: str


@pytest.fixture
def molora(capsys, monkeypatch) -> Callable[..., Ran]:
    """`molora("train", "--domain", ...)`: exit code, standard output, standard error."""
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)

    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call


def write_texts(folder: Path, letters: str, seed: int, count: int = 160) -> Path:
    """Documents of words made from a few letters, no two alike."""
    source = random.Random(seed)
    folder.mkdir(parents=True)
    words = [
        "".join(source.choice(letters) for _ in range(source.randint(2, 6))) for _ in range(99)
    ]
    for index in range(count):
        text = " ".join(source.choice(words) for _ in range(50))
        (folder / f"{index:03d}.txt").write_text(text, encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Setup:
    """A tiny cooperative, texts of two domains, and what was trained on them."""

    root: Path
    cooperative: Path
    texts: dict[str, Path]
    trained: dict[str, Path]


@pytest.fixture(scope="session")
def setup(tmp_path_factory, tiny_checkpoint) -> Setup:
    """Do not write to it; `molora fuse --out` elsewhere is fine."""
    root = tmp_path_factory.mktemp("cooperative")
    texts = {
        "abc": write_texts(root / "texts-abc", "abcd", seed=1),
        "xyz": write_texts(root / "texts-xyz", "wxyz", seed=2),
    }
    create = ["coop", "create", "tiny", "--base", tiny_checkpoint(), "--folder", root / "tiny"]
    create += ["--steps", "12", "--kind", "lora", "--rank", "4", "--block-size", "32"]
    create += ["--privacy", "pooled"]
    assert run([str(part) for part in create]) == 0
    trained = {}
    for domain, folder in texts.items():
        trained[domain] = root / f"trained-{domain}"
        train = ["train", "--cooperative", root / "tiny", "--domain", domain, "--data", folder]
        train += ["--out", trained[domain], "--threads", "1", "--name", f"{domain}-1"]
        assert run([str(part) for part in train]) == 0
    return Setup(root, root / "tiny", texts, trained)


@pytest.fixture(scope="session")
def fused_once(setup, tmp_path_factory) -> Path:
    """A folder with the cooperative after a fusion (`tiny`) and what it made (`out`); copy it."""
    root = tmp_path_factory.mktemp("fused") / "once"
    shutil.copytree(setup.cooperative, root / "tiny")
    trained = [str(folder) for folder in setup.trained.values()]
    fuse = ["fuse", "--cooperative", str(root / "tiny"), *trained, "--out", str(root / "out")]
    assert run(fuse) == 0
    return root
