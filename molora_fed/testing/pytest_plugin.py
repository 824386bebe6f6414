"""Fixtures for tests of plugins, found by pytest wherever molora-fed is installed.

Whatever is heavy is imported when a fixture is first used, so that other projects' tests start as
fast as before.
"""

import copy
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank
    from molora_fed.contributions.admission import AdmissionCandidate
    from molora_fed.models.base import Base
    from molora_fed.testing.cooperatives import TinyCooperative

__all__ = [
    "tiny_bank",
    "tiny_base",
    "tiny_candidate",
    "tiny_checkpoint",
    "tiny_cooperative",
    "tiny_model",
]


@cache
def _build_model(architecture: str, seed: int) -> Any:
    from molora_fed.testing.models import build_tiny_model

    return build_tiny_model(architecture, seed)


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """`tiny_model(architecture="gpt_neox", seed=0)`: a random model, free to be changed."""

    def take(architecture: str = "gpt_neox", seed: int = 0) -> Any:
        return copy.deepcopy(_build_model(architecture, seed))

    return take


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_checkpoint(architecture="gpt_neox", seed=0)`: saved with a tokenizer; read only."""
    from molora_fed.testing.models import build_tiny_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def build(architecture: str = "gpt_neox", seed: int = 0) -> Path:
        return build_tiny_checkpoint(root / f"{architecture}-{seed}", architecture, seed)

    return build


@pytest.fixture(scope="session")
def tiny_base(tiny_checkpoint: Callable[..., Path]) -> "Base":
    """A loaded base: model, tokenizer and fingerprints; read only."""
    from molora_fed.models.base import load_base

    return load_base(tiny_checkpoint())


@pytest.fixture
def tiny_bank() -> "CalibrationBank":
    """A calibration bank of made-up numbers with every column that a router may read."""
    from molora_fed.testing.banks import build_synthetic_bank

    bank: CalibrationBank = build_synthetic_bank()
    return bank


@pytest.fixture(scope="session")
def _kept_cooperative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that every test gets a copy of."""
    from molora_fed.testing.cooperatives import build_tiny_cooperative

    folder = tmp_path_factory.mktemp("cooperative")
    build_tiny_cooperative(folder)
    return folder


@pytest.fixture
def tiny_cooperative(_kept_cooperative: Path, tmp_path: Path) -> "TinyCooperative":
    """A cooperative with two contributions that nobody has admitted yet; the test's own copy.

    `fuse_contributions(tiny.cooperative, list(tiny.contributions.values()))` fuses them within
    seconds.
    """
    from molora_fed.testing.cooperatives import open_tiny_cooperative

    folder = tmp_path / "tiny"
    shutil.copytree(_kept_cooperative, folder)
    return open_tiny_cooperative(folder)


@pytest.fixture
def tiny_candidate(tiny_cooperative: "TinyCooperative") -> "AdmissionCandidate":
    """What an admission check looks at: one contribution, the other one admitted."""
    from molora_fed.testing.cooperatives import build_candidate

    return build_candidate(tiny_cooperative)
