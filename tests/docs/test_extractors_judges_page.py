"""The page names everything that is registered, and its Python runs as it stands."""

import re
from pathlib import Path

import pytest

from molora_fed.plugins import load_plugins

PAGE = Path(__file__).parents[2] / "docs" / "extractors_judges.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("registry", ["extractors", "judges", "escalation_policies"])
def test_everything_registered_has_a_row(registry):
    page = PAGE.read_text(encoding="utf-8")
    mine = [one for one in getattr(load_plugins(), registry) if one.origin.startswith("acar")]
    assert mine
    assert not [one.name for one in mine if f"\n| `{one.name}` |" not in page]


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "block", "exec"), {"__name__": "block"})


def test_it_counts_the_programs_that_try_to_get_out():
    from molora_acar.hostile_programs import PROGRAMS

    assert f"has {len(PROGRAMS)} programs" in PAGE.read_text(encoding="utf-8")
