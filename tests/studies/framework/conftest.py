"""The trivial study, in this process and in workers, with a cache of its own."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder that workers and commands use, too."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def studies(monkeypatch):
    """The installed studies and the trivial study, also for commands of this process."""
    import trivial_study
    from molora_studies.framework import registry

    found = registry.load_studies(extra=[("sums 1.0", trivial_study)])
    monkeypatch.setattr(registry, "get_studies", lambda: found)
    return found
