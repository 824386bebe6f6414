"""The router of docs/writing_plugins.md is real: its code runs and keeps the contract."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "writing_plugins.md"


def test_the_example_router_passes_its_own_test():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert "check_router_conformance(LastTokenRouter)" in blocks[-1]
    exec(compile("\n".join(blocks), "writing_plugins.md", "exec"), {"__name__": "page"})
