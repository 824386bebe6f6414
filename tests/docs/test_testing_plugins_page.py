"""docs/testing_plugins.md names all builders and fixtures, and its code runs."""

import re
from pathlib import Path

import pytest

from molora_fed import testing
from molora_fed.testing import pytest_plugin

PAGE = (Path(__file__).parents[2] / "docs" / "testing_plugins.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_every_builder_and_fixture_is_named():
    builders = [name for name in testing.__all__ if name.startswith("build_")]
    for name in (*builders, *pytest_plugin.__all__):
        assert f"`{name}`" in PAGE, name


@pytest.mark.parametrize("number", range(len(CODE)))
def test_its_code_runs(number, tiny_cooperative):
    namespace = {}
    exec(compile(CODE[number], f"testing_plugins.md {number}", "exec"), namespace)
    for name, function in namespace.items():
        if name.startswith("test_"):
            function(tiny_cooperative)
