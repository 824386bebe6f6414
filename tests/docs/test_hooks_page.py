"""docs/hooks.md describes every hook with its exact signature, and its examples run."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

from molora_fed import hookspecs, testing
from molora_fed.cascade.contract import (
    Candidate,
    CascadeTask,
    JudgeRequest,
    ProbeEvidence,
    Verdict,
)
from molora_fed.plugins import load_plugins
from molora_fed.population.contract import (
    Birth,
    Fitness,
    LifecycleState,
    LossTable,
    Population,
    Slot,
)

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


KITS = {
    "extractors": testing.examine_extractor,
    "escalation_policies": testing.examine_policy,
    "fitness_scopes": testing.examine_scope,
    "judges": testing.examine_judge,
    "lifecycle_operators": testing.examine_operator,
    "task_families": testing.examine_task_family,
}


def find_example(hook):
    (example,) = (text for text in EXAMPLES if f"def {hook}(register):" in text)
    return example


@pytest.mark.parametrize("suffix", sorted(KITS))
def test_example_conforms(suffix):
    hook = f"register_{suffix}"
    namespace = {}
    exec(compile(find_example(hook), f"hooks.md {hook}", "exec"), namespace)
    plugin = type("Example", (), {hook: staticmethod(namespace[hook])})
    before = load_plugins().registries()[suffix].names()
    registry = load_plugins(extra=[("example 1.0", plugin)]).registries()[suffix]
    (name,) = set(registry.names()) - set(before)
    broken = [one for one in KITS[suffix](registry.resolve(name)) if one.problem is not None]
    assert broken == []


def test_example_of_a_command_conforms(tmp_path, monkeypatch):
    (tmp_path / "molora_greet.py").write_text(find_example("register_commands"))
    monkeypatch.syspath_prepend(str(tmp_path))
    testing.check_command_conformance("molora_greet:greet")


@pytest.mark.parametrize(
    "described",
    [
        Birth,
        Candidate,
        CascadeTask,
        Fitness,
        JudgeRequest,
        LifecycleState,
        LossTable,
        Population,
        ProbeEvidence,
        Slot,
        Verdict,
    ],
)
def test_every_field_has_a_row(described):
    (table,) = re.findall(
        rf"^\| `{described.__name__}` \|.*\n\|-.*\n((?:\|.*\n)+)", PAGE.read_text(), re.M
    )
    assert re.findall(r"^\| `(\w+)` \|", table, re.M) == [one.name for one in fields(described)]
