"""What `molora_fed` hands to plugins and scripts."""

import ast
import subprocess
import sys
from pathlib import Path

import molora_fed

HEAVY = ("torch", "transformers", "flwr", "peft", "scipy", "matplotlib")


def test_every_public_name_is_loaded_from_where_it_lives():
    for name in molora_fed.__all__:
        assert getattr(molora_fed, name) is not None
    assert molora_fed.OutputRouter.__module__ == "molora_fed.routing.contract"
    assert set(molora_fed.__all__) <= set(dir(molora_fed))
    assert 30 <= len(molora_fed.__all__) - 2 <= 50


def test_type_checkers_and_the_running_package_see_the_same_names():
    tree = ast.parse(Path(molora_fed.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: statement.module for statement in block.body for alias in statement.names}
    assert seen == molora_fed._MODULE_OF


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(molora_fed, "Nothing")


def test_importing_the_package_loads_nothing_heavy():
    script = f"import sys, molora_fed; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
