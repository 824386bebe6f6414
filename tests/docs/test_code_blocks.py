"""Every block of code in the documentation says what it is in; every page has its tests."""

import re
from pathlib import Path

import pytest
from page_helpers import ROOT, check_command, list_blocks, list_commands, read_page

from molora_fed.plugins import load_plugins

LANGUAGES = {"bash", "console", "python", "toml", "text"}
PAGES = [
    "README.md",
    *(
        str(path.relative_to(ROOT))
        for folder in ("docs", "docs/hooks", "docs/reference")
        for path in sorted((ROOT / folder).glob("*.md"))
    ),
]
RUN_BY = {
    "README.md": "cli/test_page_commands.py",
    "docs/acar_study.md": "cli/test_page_commands.py",
    "docs/adapters.md": "cli/test_page_commands.py",
    "docs/baselines.md": "cli/test_page_commands.py",
    "docs/cascades.md": "docs/test_cascades_page.py cli/test_page_commands.py",
    "docs/causal_lm.md": "cli/test_page_commands.py",
    "docs/contributor_tutorial.md": "docs/test_contributor_tutorial.py",
    "docs/deploy.md": "cli/test_page_commands.py",
    "docs/evolution_studies.md": "cli/test_page_commands.py",
    "docs/export.md": "cli/test_page_commands.py",
    "docs/extractors_judges.md": "docs/test_extractors_judges_page.py",
    "docs/federation.md": "federation/test_simulation.py",
    "docs/forecasts.md": "cli/test_page_commands.py",
    "docs/hooks.md": "docs/test_hooks_page.py",
    "docs/merges.md": "cli/test_page_commands.py",
    "docs/overlap.md": "docs/test_overlap_page.py",
    "docs/plugin_failures.md": "docs/test_plugin_failures_page.py",
    "docs/plugin_tutorial.md": "cli/test_plugin_tutorial.py",
    "docs/populations.md": "docs/test_populations_page.py cli/test_page_commands.py",
    "docs/private_fusion.md": "docs/test_private_fusion_page.py",
    "docs/protocol.md": "cli/test_page_commands.py",
    "docs/routers.md": "unit/fusion/test_arrow.py",
    "docs/serving.md": "cli/test_api_process.py cli/test_page_commands.py",
    "docs/studies.md": "docs/test_studies_page.py cli/test_page_commands.py",
    "docs/tasks.md": "cli/test_page_commands.py",
    "docs/testing_plugins.md": "docs/test_testing_plugins_page.py cli/test_page_commands.py",
    "docs/traces.md": "docs/test_traces_page.py cli/test_page_commands.py",
    "docs/writing_plugins.md": "docs/test_writing_plugins_page.py cli/test_page_commands.py",
    **{
        str(path.relative_to(ROOT)): "docs/test_hooks_page.py"
        for path in (ROOT / "docs" / "hooks").glob("*.md")
    },
}
"""The tests that run a page's blocks, in tests/; what is left: docs/results/plugin_authors.md."""

READ_ONLY = {
    "docs/index.md": "`make demo`, which the README's figures come from",
    "docs/tournament.md": "tests/cli/test_tournament.py plays one on a smaller cooperative",
}
"""Pages whose commands are only looked up here, and what runs the like of them."""


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is_in(page):
    text = read_page(page)
    languages = [language for language, _ in list_blocks(text)]
    assert 2 * len(languages) == len(re.findall("^ *```", text, re.MULTILINE))
    assert set(languages) <= LANGUAGES


@pytest.mark.parametrize("page", PAGES)
def test_what_is_text_holds_no_command(page):
    for language, code in list_blocks(read_page(page)):
        if language == "text" and page != "docs/reference/commands.md":  # usage lines
            assert not re.findall(r"^(?:\$ |molora \w+ (?=\S))", code, re.MULTILINE), code


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("docs/hooks/")])
def test_every_command_is_there(page):
    plugins = load_plugins()
    for language, code in list_blocks(read_page(page)):
        if language in ("bash", "console"):
            for line in list_commands(code):
                if re.match(r"(?:\S*/)?molora ", line):
                    check_command(line, plugins)


@pytest.mark.parametrize("page", PAGES)
def test_some_test_runs_its_blocks(page):
    blocks = [block for block in list_blocks(read_page(page)) if block[0] != "text"]
    assert bool(blocks) == (page in RUN_BY.keys() | READ_ONLY.keys())
    for name in RUN_BY.get(page, "").split():
        test = (ROOT / "tests" / name).read_text(encoding="utf-8")
        assert Path(page).name in test or "docs/hooks" in page
