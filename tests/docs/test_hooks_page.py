"""Every hook has a page of five sections; its code runs, its example and its charter hold."""

import importlib
import inspect
import re
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from molora_cli.plugin_new import KINDS
from page_helpers import check_command, find_blocks, list_commands

from molora_fed import bank, hookspecs, types
from molora_fed.adapters import updates
from molora_fed.adapters.contract import open_kind
from molora_fed.bank import views
from molora_fed.cascade import contract as cascade
from molora_fed.cascade.config import CascadeConfig
from molora_fed.charter import Charter
from molora_fed.contributions import admission, carried
from molora_fed.cooperative.cooperative import check_charter_names
from molora_fed.errors import CascadeError, CharterError, PopulationError
from molora_fed.models.hidden_statistics import HiddenStatistics
from molora_fed.plugins import load_plugins
from molora_fed.population import contract as population
from molora_fed.routing.summed import FitSetting
from molora_fed.storage.settings import open_options
from molora_fed.testing.kits import KITS

DOCS = Path(__file__).parents[2] / "docs"
OVERVIEW = (DOCS / "hooks.md").read_text(encoding="utf-8")
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("register_"))
PAGES = {
    path.stem: path.read_text(encoding="utf-8") for path in sorted((DOCS / "hooks").glob("*.md"))
}
SECTIONS = [
    "What you write",
    "A complete example",
    "Its test",
    "How it is used",
    "What is checked",
]
DESCRIBED = {
    "admission-checks": (admission.AdmissionCandidate, types.Finding),
    "adapter-routers": (views.GateView,),
    "carried-files": (carried.CarriedContext,),
    "domains": (types.Document,),
    "escalation-policies": (cascade.ProbeEvidence,),
    "extractors": (cascade.CascadeTask,),
    "fitness-scopes": (population.LossTable, population.Fitness),
    "gain-predictors": (types.Case, types.LossMatrix, types.Outcome, types.Forecast),
    "judges": (
        cascade.JudgeRequest,
        cascade.Candidate,
        cascade.Verdict,
        cascade.Request,
        cascade.Sample,
    ),
    "lifecycle-operators": (
        population.LifecycleState,
        population.Population,
        population.Slot,
        population.Birth,
    ),
    "merges": (updates.Adapter, updates.LinearUpdate),
    "routers": (views.RouterView, bank.CalibrationBank, FitSetting, HiddenStatistics),
    "task-families": (cascade.CascadeTask,),
}


def find_suffix(page):
    """Suffix of the hook in the heading of a page."""
    return re.match(r"# register_(\w+)\(", PAGES[page])[1]


def cut(page):
    """Text of each section by its heading."""
    _, *parts = re.split(r"^## (.+)\n", PAGES[page], flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.fixture
def example(request, tmp_path, monkeypatch):
    """The module that the example of a page is, as a file of its own."""
    text = cut(request.param)["A complete example"]
    (name,) = re.findall(r"the whole file `(\w+)\.py`", text, flags=re.IGNORECASE)
    (code,) = find_blocks(text, "python")
    folder = tmp_path / "plugin"
    folder.mkdir()
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module(name)
    del sys.modules[name]


@pytest.fixture
def plugins(example):
    return load_plugins(extra=[("example 1.0", example)])


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_has_a_page_with_its_signature_and_five_sections(hook):
    arguments = ", ".join(inspect.signature(getattr(hookspecs, hook)).parameters)
    (page,) = (
        name for name, text in PAGES.items() if text.startswith(f"# {hook}({arguments})\n\n")
    )
    assert page == hook.removeprefix("register_").replace("_", "-")
    assert list(cut(page)) == SECTIONS


@pytest.mark.parametrize("hook", HOOKS)
def test_overview_has_a_row_with_page_template_and_kit(hook):
    suffix = hook.removeprefix("register_")
    kinds = [kind for kind, of in KINDS.items() if of == suffix]
    row = next(line for line in OVERVIEW.splitlines() if line.startswith(f"| [`{hook}`]"))
    _, link, _, kind, kit, _ = (cell.strip() for cell in row.split("|"))
    assert link == f"[`{hook}`](hooks/{suffix.replace('_', '-')}.md)"
    assert kind == "".join(f"`{one}`" for one in kinds)
    examine = KITS[suffix].partition(":")[2]
    assert kit == f"`{examine.replace('examine', 'check')}_conformance`"


AWAITED = {"carried file": "gates that owners train, a plugin of contrib/"}
"""Kinds whose first user is a package that nothing of the product installs."""


def test_every_registry_has_a_hook_and_every_hook_a_first_party_user():
    plugins = load_plugins()
    assert sorted(f"register_{suffix}" for suffix in plugins.registries()) == HOOKS
    for registry in plugins.registries().values():
        assert registry.names() or registry.kind in AWAITED, (
            f"no first-party user of {registry.kind}"
        )


@pytest.mark.parametrize("example", sorted(PAGES), indirect=True)
def test_example_registers_what_its_page_is_about(example, plugins, request):
    page = find_page(request)
    registry = plugins.registries()[find_suffix(page)]
    added = set(registry.names()) - set(load_plugins().registries()[find_suffix(page)].names())
    (name,) = added
    assert registry.resolve(name) is not None
    sections = cut(page)
    assert name in sections["How it is used"]
    assert name in find_blocks(sections["What is checked"], "text")[0]


def find_page(request):
    """Page that a test is about, from its parameter."""
    return request.node.callspec.params["example"]


@pytest.mark.parametrize("example", sorted(PAGES), indirect=True)
def test_its_test_passes(example, request):
    page = find_page(request)
    (code,) = find_blocks(cut(page)["Its test"], "python")
    namespace = {}
    exec(compile(code, f"test of {page}.md", "exec"), namespace)
    tests = {name: one for name, one in namespace.items() if name.startswith("test_")}
    assert tests
    assert re.search(r"\bcheck_\w+_conformance\(", code)
    for test in tests.values():
        test(**{name: request.getfixturevalue(name) for name in inspect.signature(test).parameters})


@pytest.mark.parametrize(
    ("page", "number"),
    [
        (page, number)
        for page in sorted(PAGES)
        for number in range(len(find_blocks(cut(page)["What you write"], "python")))
    ],
)
def test_further_code_runs_and_keeps_the_contract(page, number):
    namespace = {"__name__": "page"}
    code = find_blocks(cut(page)["What you write"], "python")[number]
    exec(compile(code, f"{page}.md", "exec"), namespace)
    made = [one for one in namespace.values() if getattr(one, "__module__", "") == "page"]
    assert made
    module, _, kit = KITS[find_suffix(page)].partition(":")
    examine = getattr(importlib.import_module(module), kit)
    assert [one for one in examine(made[-1]) if one.problem is not None] == []


def read_charter(text):
    """A charter of these lines, beside what every charter has."""
    given = tomllib.loads(text)
    base = {"id": "tiny", "weights": "ab" * 32, "tokenizer": "cd" * 32}
    identity = {"name": "tiny", "base": base, **given.pop("identity", {})}
    return Charter.model_validate({"identity": identity, **given})


def check_charter(charter, plugins):
    """What `molora coop amend` looks at before it signs, and what is opened later."""
    check_charter_names(charter, plugins)
    fusion, rules = charter.amendment.fusion, charter.amendment.population
    fix = "Correct the page."
    open_options(plugins.routers, fusion.router, fusion.options, error=CharterError, fix=fix)
    opened = (plugins.adapter_routers, rules.router, rules.options)
    open_options(*opened, error=PopulationError, fix=fix)
    for one in rules.lifecycle:
        opened = (plugins.lifecycle_operators, one.name, one.options)
        open_options(*opened, error=PopulationError, fix=fix)
    open_kind(charter.amendment.training.kind, charter.amendment.training.options, plugins)


def check_cascade(lines, plugins):
    """The same of a cascade."""
    whole = {"members": ["one", "two", "three"], "probe": "one", **lines["cascade"]}
    models = {name: {"kind": "base", "path": name} for name in whole["members"]}
    config = CascadeConfig.model_validate({"cascade": whole, "models": models}).cascade
    cascade.open_judge(config.judge, plugins, config.judge_options)
    opened = (plugins.escalation_policies, config.policy, config.policy_options)
    open_options(*opened, error=CascadeError, fix="Correct the page.")


UNNAMED = ("commands", "extractors", "task-families")
"""Hooks whose things no charter and no cascade names."""


@pytest.mark.parametrize("example", sorted(set(PAGES) - set(UNNAMED)), indirect=True)
def test_its_lines_of_a_charter_are_accepted(example, plugins, request):
    blocks = find_blocks(cut(find_page(request))["How it is used"], "toml")
    assert blocks
    for text in blocks:
        lines = tomllib.loads(text)
        if "cascade" in lines:
            check_cascade(lines, plugins)
        else:
            check_charter(read_charter(text), plugins)


@pytest.mark.parametrize("example", sorted(PAGES), indirect=True)
def test_its_commands_and_their_options_exist(example, plugins, request):
    text = cut(find_page(request))["How it is used"]
    lines = [line for block in find_blocks(text, "bash") for line in list_commands(block)]
    assert lines
    for line in lines:
        check_command(line, plugins)


@pytest.mark.parametrize(
    ("page", "described"), [(page, one) for page, some in DESCRIBED.items() for one in some]
)
def test_every_field_has_a_row(page, described):
    (table,) = re.findall(
        rf"^\| `{described.__name__}` \|.*\n\|-.*\n((?:\|.*\n)+)", PAGES[page], re.MULTILINE
    )
    names = [one.name for one in fields(described) if not one.name.startswith("_")]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == names


def test_options_of_the_overview_are_opened_and_its_charter_is_read():
    (code,) = find_blocks(OVERVIEW, "python")
    namespace = {}
    exec(compile(code, "hooks.md", "exec"), namespace)
    hook = "register_admission_checks"
    plugin = type("Example", (), {hook: staticmethod(namespace[hook])})
    checks = load_plugins(extra=[("example 1.0", plugin)]).admission_checks
    assert "licence-of" in checks.names()
    (lines,) = find_blocks(OVERVIEW, "toml")
    assert read_charter(lines).amendment.admission.checks[0].options == {"accepted": ["MIT"]}


def test_kits_and_templates_name_pages_that_there_are():
    root = DOCS.parent
    files = [
        *(root / "molora_fed" / "testing").glob("*.py"),
        *(root / "cli" / "molora_cli" / "templates").rglob("*.py"),
    ]
    named = {
        page
        for file in files
        for page in re.findall(r"docs/[\w/-]+\.md", file.read_text(encoding="utf-8"))
    }
    assert {f"docs/hooks/{page}.md" for page in PAGES} <= named
    assert [page for page in sorted(named) if not (root / page).is_file()] == []
