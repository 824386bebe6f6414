"""docs/hooks.md describes every hook with its exact signature, and its examples run."""

import inspect
import re
from pathlib import Path

import pytest

from molora_fed import hookspecs
from molora_fed.plugins import load_plugins

PAGE = Path(__file__).parents[2] / "docs" / "hooks.md"
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("register_"))
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_has_a_heading_with_its_signature(hook):
    arguments = ", ".join(inspect.signature(getattr(hookspecs, hook)).parameters)
    assert f"\n## {hook}({arguments})\n" in PAGE.read_text()


AWAITED = {"carried file": "gates that owners train, a plugin of contrib/"}
"""Kinds whose first user is a package that nothing of the product installs."""


def test_every_registry_has_a_hook_and_every_hook_a_first_party_user():
    plugins = load_plugins()
    assert sorted(f"register_{suffix}" for suffix in plugins.registries()) == HOOKS
    for registry in plugins.registries().values():
        assert registry.names() or registry.kind in AWAITED, (
            f"no first-party user of {registry.kind}"
        )


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number):
    namespace = {}
    exec(compile(EXAMPLES[number], f"hooks.md example {number}", "exec"), namespace)
    plugin = type("Example", (), {k: staticmethod(v) for k, v in namespace.items() if k in HOOKS})
    before = load_plugins()
    after = load_plugins(extra=[("example 1.0", plugin)])
    count = sum(len(r.names()) for r in before.registries().values())
    assert sum(len(r.names()) for r in after.registries().values()) == count + 1
