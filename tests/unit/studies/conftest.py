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
def plugins(monkeypatch):
    """The installed plugins and the trivial study, also for commands of this process."""
    import trivial_study

    from molora_fed import plugins

    found = plugins.load_plugins(extra=[("sums 1.0", trivial_study)])
    monkeypatch.setattr(plugins, "get_plugins", lambda: found)
    return found
