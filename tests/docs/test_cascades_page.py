"""The examples of docs/cascades.md are real: its code runs, its descriptions are accepted."""

import re
from pathlib import Path

from molora_fed.cascade.config import CascadeSection, EndpointSource, RetrievalConfig, load_config

PAGE = (Path(__file__).parents[2] / "docs" / "cascades.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_code_runs():
    for block in blocks("python"):
        exec(compile(block, "cascades.md", "exec"), {"__name__": "page"})


def test_descriptions_are_accepted(tmp_path):
    whole, retrieval = blocks("toml")
    (tmp_path / "c.toml").write_text(whole)
    config = load_config(tmp_path / "c.toml")
    assert {one.kind for one in config.models.values()} >= {"base", "specialist", "fused"}
    models = '[models.m]\nkind = "base"\npath = "b"\n'
    (tmp_path / "r.toml").write_text(retrieval + models)
    found = load_config(tmp_path / "r.toml").cascade.retrieval
    assert found is not None and found.threshold == 0.7


def test_every_setting_is_on_the_page():
    sections = (CascadeSection, RetrievalConfig, EndpointSource)
    settings = {name for section in sections for name in section.model_fields}
    missing = [name for name in sorted(settings) if name not in PAGE]
    assert missing == []
