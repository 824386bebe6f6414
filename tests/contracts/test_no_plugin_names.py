"""The core names no plugin: what a charter means by a name is whatever is registered under it."""

import ast
from pathlib import Path

import pytest

from molora_fed.plugins import load_plugins

ROOT = Path(__file__).parents[2]
CORE = ROOT / "molora_fed"
BUILT_IN = ("core ", "cli ")
# Words that the core uses for something else, too.
OTHERWISE = {
    "always": "an action of Python's warnings",
    "choices": "a key of OpenAI's protocol",
    "code": "a key of a recorded error",
    "evidence": "a column that routers read",
    "number": "an amendment's number",
    "sigma": "a key of decisions in traces",
    "statistics": "a mode of privacy, and what is published in it",
    "uniform": "the key of equal gates in results",
}


def list_names():
    """Names that plugins register and that the core does not use otherwise."""
    registries = load_plugins().registries().values()
    entries = (entry for registry in registries for entry in registry)
    return {entry.name for entry in entries if not entry.origin.startswith(BUILT_IN)}


NAMES = list_names()


def list_mentions(path):
    """Lines whose text constants are, or quote, a plugin's name; docstrings are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    passed = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            passed.add(node.value)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").startswith(
            ("_UNNAMED", "_DEFAULT")
        ):
            passed.update(ast.walk(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in passed:
            quoted = {name for name in NAMES if f"'{name}'" in node.value}
            if quoted or node.value in NAMES - OTHERWISE.keys():
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {node.value!r}"


def test_what_is_used_otherwise_is_a_name_of_a_plugin():
    assert OTHERWISE.keys() <= NAMES


@pytest.mark.parametrize("folder", sorted({path.parent for path in CORE.rglob("*.py")}), ids=str)
def test_no_text_of_the_core_names_a_plugin(folder):
    assert [line for path in sorted(folder.glob("*.py")) for line in list_mentions(path)] == []


def list_comparisons(path):
    """Lines that compare something with the name of one of the core's own kinds of adapter."""
    kinds = {"lora", "svd", "delta"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare | ast.MatchValue):
            named = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
            if kinds & {name for name in named if isinstance(name, str)}:
                yield f"{path.relative_to(ROOT)}:{node.lineno}"


def test_nothing_in_the_core_depends_on_the_name_of_a_kind_of_adapter():
    assert [line for path in sorted(CORE.rglob("*.py")) for line in list_comparisons(path)] == []
