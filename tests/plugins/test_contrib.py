"""The worked third-party packages of contrib/ use what a stranger could, and pass their tests."""

import ast
import importlib
import os
import sys
import tomllib
from pathlib import Path

import pytest
from forking_helpers import run_forked

from molora_fed.plugins import load_plugins

REPOSITORY = Path(__file__).parents[2]
PROJECTS = sorted(path.parent for path in REPOSITORY.glob("contrib/*/pyproject.toml"))
FACES = {"molora_fed", "molora_fed.adapters", "molora_fed.testing"}
"""What is promised to authors; docs/writing_plugins.md lists its names."""
NAMES = {
    "molora-arrow": {"arrow"},
    "molora-books": {"books"},
    "molora-last-token": {"last-token"},
    "molora-outlier": {"norm-and-spectrum"},
    "molora-phatgoose": {"phatgoose", "phatgoose-gate"},
    "molora-tokens": {"token-gate"},
}

each_project = pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)


def list_names(plugins):
    return {
        (registry.kind, entry.name): entry
        for registry in plugins.registries().values()
        for entry in registry
    }


@each_project
def test_loads_beside_the_others(project, monkeypatch):
    monkeypatch.syspath_prepend(str(project))
    module = importlib.import_module(project.name.replace("-", "_"))
    before = list_names(load_plugins())
    plugins = load_plugins(extra=[(f"{project.name} 0.1.0", module)])
    added = {key: entry for key, entry in list_names(plugins).items() if key not in before}
    assert {name for _, name in added} == NAMES[project.name]
    for registry in plugins.registries().values():
        for entry in registry:
            if (registry.kind, entry.name) in added:
                assert entry.origin == f"{project.name} 0.1.0"
                assert registry.resolve(entry.name).__module__.startswith(module.__name__)


@each_project
def test_imports_nothing_of_the_core_but_its_public_faces(project):
    own = project.name.replace("-", "_")
    for path in project.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                found = [node.module or ""]
            elif isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            else:
                continue
            for module in found:
                root = module.partition(".")[0]
                assert not root.startswith("molora_") or root == own or module in FACES, (
                    f"{path.relative_to(REPOSITORY)} imports {module}"
                )


@each_project
def test_no_file_of_the_product_knows_it(project):
    words = {project.name, project.name.replace("-", "_")}
    words |= {f'"{name}"' for name in NAMES[project.name] if "-" in name}
    for folder in ("molora_fed", "cli", "plugins"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not [word for word in words if word in text], path
    project_file = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert project.name not in str(project_file)


def run_own_tests(project):
    os.chdir(project)
    sys.path.insert(0, str(project))
    plain = ["-q", "-p", "no:cacheprovider", "--assert", "plain"]
    sys.exit(pytest.main([*plain, str(project / "tests")]))


@pytest.mark.processes
@each_project
def test_passes_its_own_tests(project, tmp_path):
    done = run_forked(tmp_path, run_own_tests, project)
    assert done.code == 0, done.out
