"""docs/writing_plugins.md: its router keeps the contract, its list of names is the public face."""

import re
from pathlib import Path

import molora_fed

PAGE = (Path(__file__).parents[2] / "docs" / "writing_plugins.md").read_text(encoding="utf-8")


def test_the_example_router_passes_its_own_test():
    plugin, test = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    namespace = {"__name__": "page"}
    exec(compile(plugin + test, "writing_plugins.md", "exec"), namespace)
    registered = {}
    namespace["register_routers"](lambda name, target, **texts: registered.update({name: target}))
    assert registered == {"last-token": namespace["LastTokenRouter"]}
    namespace["test_keeps_the_contract"]()


def test_every_public_name_is_in_the_table_of_imports():
    section = PAGE.partition("## What to import")[2].partition("\n## ")[0]
    cells = [line.split("|")[2] for line in section.splitlines() if line.startswith("| ")]
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(molora_fed.__all__) - {"__version__"}
