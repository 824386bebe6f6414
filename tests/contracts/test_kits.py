"""Every registered plugin passes the kit of its hook; routers have tests of their own."""

import pytest

from molora_fed.plugins import load_plugins
from molora_fed.testing import KITS, open_kit

PLUGINS = load_plugins()
SLOW = ("docstrings-", "cpp", "python", "science")
"""Domains that go through whole packages."""


def list_cases():
    for suffix in ("admission_checks", "adapter_kinds", "domains", "gain_predictors", "merges"):
        for name in PLUGINS.registries()[suffix].names():
            is_slow = suffix == "domains" and name.startswith(SLOW)
            marks = [pytest.mark.long] if is_slow else []
            yield pytest.param(suffix, name, marks=marks, id=f"{suffix} {name}")


@pytest.mark.parametrize(("suffix", "name"), tuple(list_cases()))
def test_a_registered_plugin_passes_the_kit_of_its_hook(suffix, name):
    found = open_kit(suffix)(PLUGINS.registries()[suffix].resolve(name))
    broken = {result.name: result.problem for result in found if result.problem is not None}
    if suffix == "domains" and "CorpusError" in broken.get("reads documents", ""):
        pytest.skip("its text is not on this machine")
    assert broken == {}
    assert len(found) >= 6


def test_every_hook_has_a_kit():
    assert KITS.keys() == PLUGINS.registries().keys()
