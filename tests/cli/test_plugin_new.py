"""`molora plugins new`: a package of every kind lints, loads and passes its own tests as made."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from forking_helpers import run_forked
from molora_cli.plugin_new import KINDS, MAX_NAME, TEMPLATES

from molora_fed.plugins import load_plugins

RUFF = Path(sys.executable).with_name("ruff")


def list_files(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in files if path.suffix != ".pyc"}


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def make(molora, at_home):
    """Make a package of a kind in an empty folder; gives its folder."""

    def call(kind, name=None):
        name = name or f"made-{kind}"
        done = molora("plugins", "new", name, "--kind", kind)
        assert done.code == 0, done.err
        return at_home / f"molora-{name}"

    return call


def test_every_hook_has_a_kind():
    assert sorted(KINDS.values()) == sorted(load_plugins().registries())


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_is_whole_and_lints(kind, make):
    folder = make(kind)
    module = folder.name.replace("-", "_")
    found = list_files(folder)
    (filled,) = {path for path in found if path.startswith(module)} - {
        f"{module}/__init__.py",
        f"{module}/py.typed",
    }
    assert found - {filled, f"{module}/__init__.py", f"{module}/py.typed"} == {
        ".github/workflows/test.yml",
        ".gitignore",
        "README.md",
        "pyproject.toml",
        f"tests/test_made_{kind.replace('-', '_')}.py",
    }
    whole = "".join((folder / path).read_text() for path in found)
    assert "ample-" not in whole and "ample_" not in whole and "$" not in whole
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([RUFF, *command, "."], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_with_a_long_name_lints(kind, make):
    folder = make(kind, "x" * (MAX_NAME - 2) + "-y")
    done = subprocess.run([RUFF, "check", "."], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def install(folder, home):
    """What `pip install -e` leaves: a way to the package, and its entry points."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = home / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["molora_fed"].items()
    lines = ["[molora_fed]", *(f"{name} = {module}" for name, module in points)]
    (info / "entry_points.txt").write_text("\n".join(lines))


def test_packages_of_all_kinds_load_beside_each_other(make, molora, at_home, monkeypatch):
    before = {suffix: one.names() for suffix, one in load_plugins().registries().items()}
    for kind in KINDS:
        folder = make(kind, f"beside-{kind}")
        install(folder, at_home)
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.syspath_prepend(str(at_home))
    plugins = load_plugins()
    assert plugins.failures == []
    for kind, suffix in KINDS.items():
        registry = plugins.registries()[suffix]
        (name,) = set(registry.names()) - set(before[suffix])
        assert registry.entry(name).origin == f"beside-{kind} (molora-beside-{kind} 0.1.0)"
        assert registry.resolve(name).__module__.startswith("molora_beside_")


def run_own_tests(folder):
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    plain = ["-q", "-rs", "-p", "no:cacheprovider", "--assert", "plain"]
    sys.exit(pytest.main([*plain, str(folder / "tests")]))


@pytest.mark.processes
@pytest.mark.parametrize("kind", KINDS)
def test_a_package_passes_its_own_tests(kind, make, tmp_path):
    done = run_forked(tmp_path, run_own_tests, make(kind))
    assert done.code == 0, done.out + done.err


def test_says_what_to_do_next(molora, at_home):
    done = molora("plugins", "new", "last-words", "--kind", "router", "--folder", "here")
    assert done.out.splitlines()[-3:] == [
        "    pip install -e 'here[dev]'",
        "    python -m pytest here",
        "    molora fuse --cooperative COOPERATIVE --router last-words",
    ]
    assert (at_home / "here" / "molora_last_words" / "router.py").is_file()


def test_a_class_does_not_say_its_noun_twice(make):
    text = (make("router", "last-router") / "molora_last_router" / "router.py").read_text()
    assert "class LastRouter(" in text and "class LastOptions(" in text


def test_a_name_may_hold_that_of_a_sample(make):
    folder = make("router", "my-sample-router")
    test = (folder / "tests" / "test_my_sample_router.py").read_text()
    assert "from molora_my_sample_router.router import (" in test
    assert '"my-sample-router",' in (folder / "molora_my_sample_router/__init__.py").read_text()


@pytest.mark.parametrize(
    ("author", "written"),
    [
        ("Ann Lee", {"name": "Ann Lee"}),
        ('Ann "A" Lee <ann@example.org>', {"name": "Ann A Lee", "email": "ann@example.org"}),
        ("Zoë \\ Lee", {"name": "Zoë \\ Lee"}),
    ],
)
def test_an_author_is_named(author, written, molora, at_home):
    done = molora("plugins", "new", "mine", "--kind", "check", "--author", author)
    assert done.code == 0, done.err
    project = tomllib.loads((at_home / "molora-mine" / "pyproject.toml").read_text())["project"]
    assert project["authors"] == [written]


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("Last_Words", (), "lower-case words joined by dashes"),
        ("a" * (MAX_NAME + 1), (), f"at most {MAX_NAME} characters"),
        ("molora-last", (), "molora- is put before it"),
        ("evidence", (), "a name that no router has, got one of kalavai"),
        ("fed", (), "'molora_fed', which can be imported already"),
        ("mine", ("--folder", "there"), "a folder that is not there, got 'there'"),
        ("mine", ("--kind", "ruoter"), "Did you mean --kind router?"),
        ("mine", ("--author", "Ann\nLee"), "Cannot name the author"),
    ],
)
def test_refuses_in_one_line(name, more, said, molora, at_home):
    (at_home / "there").mkdir()
    before = list_files(at_home)
    done = molora("plugins", "new", name, "--kind", "router", *more)
    assert done.code == 10
    assert said in done.err and done.err.count("\n") == 1
    assert list_files(at_home) == before


def test_writes_whole_or_not_at_all(molora, at_home, monkeypatch):
    def fail(self, *_, **__):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", fail)
    done = molora("plugins", "new", "mine", "--kind", "router")
    assert "No space left" in done.err
    assert list(at_home.iterdir()) == []


def test_every_sample_has_its_test_and_its_use():
    modules = {f"molora_sample_{kind.replace('-', '_')}" for kind in KINDS}
    assert {path.name for path in TEMPLATES.glob("molora_sample_*")} == modules
    assert {path.stem for path in (TEMPLATES / "use").iterdir()} == set(KINDS)
    tests = {path.stem for path in (TEMPLATES / "tests").glob("test_*.py")}
    assert tests == {module.replace("molora", "test") for module in modules}
