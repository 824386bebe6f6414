"""The worked third-party plugins of contrib/ load beside the others and pass their own tests."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from molora_fed.plugins import load_plugins

CONTRIB = Path(__file__).parents[2] / "contrib"
PROJECTS = sorted(path.parent for path in CONTRIB.glob("*/pyproject.toml"))


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)
def test_loads_beside_the_others(project, monkeypatch):
    monkeypatch.syspath_prepend(str(project))
    module = importlib.import_module(project.name.replace("-", "_"))
    plugins = load_plugins(extra=[(f"{project.name} 0.1.0", module)])
    (name,) = set(plugins.routers.names()) - set(load_plugins().routers.names())
    assert plugins.routers.entry(name).origin == f"{project.name} 0.1.0"
    assert plugins.routers.resolve(name).__module__.startswith(module.__name__)


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)
def test_passes_its_own_tests(project):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(project / "tests")],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
