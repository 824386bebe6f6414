"""The worked third-party plugins of contrib/ load beside the others and pass their own tests."""

import importlib
import os
import sys
from pathlib import Path

import pytest
from forking_helpers import run_forked

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


def run_own_tests(project):
    os.chdir(project)
    sys.path.insert(0, str(project))
    plain = ["-q", "-p", "no:cacheprovider", "--assert", "plain"]
    sys.exit(pytest.main([*plain, str(project / "tests")]))


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)
def test_passes_its_own_tests(project, tmp_path):
    done = run_forked(tmp_path, run_own_tests, project)
    assert done.code == 0, done.out
