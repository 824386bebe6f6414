"""docs/plugin_tutorial.md as it stands: a fresh environment, three plugins made, edited and used.

Packages come from wherever pip is told to look on this machine.
"""

import ast
import json
import os
import re
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from molora_cli.plugin_new import TEMPLATES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "plugin_tutorial.md"
PARTS = (
    "pyproject.toml",
    "constraints.txt",
    "README.md",
    "LICENSE",
    "molora_fed",
    "cli",
    "plugins",
)
"""Of the checkout, what an installation is made of."""

BLOCK = re.compile(r"```(bash|python)\n(.*?)```", re.DOTALL)
FILE = re.compile(r"`(\S+\.py)`")
MAX_CPU_SECONDS = 600
"""Of everything together, installing included: ten minutes of a machine that does nothing else."""
BLOCK_SECONDS = 600
"""Of one block, by the clock; the longest, which installs torch, takes one minute."""


def list_blocks(text):
    """Language, code, and the file that the text before a block names last."""
    for found in BLOCK.finditer(text):
        named = FILE.findall(text, 0, found.start())
        yield found[1], found[2], named[-1] if named else None


def replace_function(file, code):
    """Put a function in the place of the one of its name."""
    (new,) = ast.parse(code).body
    text = file.read_text()
    lines = text.splitlines()
    (old,) = (
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.name == new.name
    )
    indented = [" " * old.col_offset + line if line else "" for line in code.splitlines()]
    lines[old.lineno - 1 : old.end_lineno] = indented
    file.write_text("\n".join(lines) + "\n")


class Reader:
    """Follows the page in an empty folder.

    Attributes:
        folder: Where it works.
        said: What all commands printed.
    """

    def __init__(self, root):
        self.folder = root / "reader"
        self.folder.mkdir()
        self.said = ""
        checkout = root / "checkout"
        for part in PARTS:
            source, target = ROOT / part, checkout / part
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target.parent.mkdir(exist_ok=True)
                shutil.copy(source, target)
        venv = self.folder / "venv"
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.environment = kept | {
            "MOLORA": str(checkout),
            "MOLORA_CACHE": str(root / "cache"),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }

    def run(self, code):
        start = time.monotonic()
        try:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", code],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=BLOCK_SECONDS,
            )
        except subprocess.TimeoutExpired as late:
            said = (late.stdout or b"").decode(errors="replace")
            raise AssertionError(f"{code}\nno end after {late.timeout} s:\n{said}") from late
        self.said += done.stdout
        print(f"{time.monotonic() - start:6.1f} s  {code.strip().splitlines()[-1][:80]}")
        assert done.returncode == 0, f"{code}\n{done.stdout}"


def compute_cpu_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def can_install(folder):
    """Whether pip finds packages on this machine, or over a network that it may use."""
    command = ["python3", "-m", "pip", "download", "--quiet", "--no-deps", "pluggy"]
    return subprocess.run([*command, "-d", folder], capture_output=True).returncode == 0


@pytest.mark.processes
def test_the_page_runs_as_it_stands_within_ten_minutes(tmp_path):
    if not can_install(tmp_path):
        pytest.skip("pip finds no packages here")
    before = compute_cpu_seconds()
    reader = Reader(tmp_path)
    for language, code, named in list_blocks(PAGE.read_text(encoding="utf-8")):
        if language == "bash":
            reader.run(code)
        else:
            replace_function(reader.folder / named, code)
    used = compute_cpu_seconds() - before
    print(f"{used:6.1f} s of processors in all")

    installed = next((reader.folder / "venv").rglob("molora_cli")) / "templates"
    shipped = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    kinds = ("*/*.py", "*/*.md", "package/*")
    samples = {path.relative_to(TEMPLATES) for kind in kinds for path in TEMPLATES.glob(kind)}
    assert samples <= shipped
    fused = json.loads((reader.folder / "try/tried/last-words/fused/fused.json").read_text())
    assert fused["router"]["name"] == "last-words"
    assert fused["plugins"]["router"]["plugin"] == "molora-last-words"
    assert "no chair for slot" in reader.said
    assert re.search(r"bottleneck +\S", reader.said)
    assert used < MAX_CPU_SECONDS


def test_every_edit_of_the_page_is_of_a_function_of_its_sample():
    text = PAGE.read_text(encoding="utf-8")
    edits = [
        (code, Path(named)) for language, code, named in list_blocks(text) if language != "bash"
    ]
    assert edits
    for code, file in edits:
        (new,) = ast.parse(code).body
        name = file.parts[0].removeprefix("molora-")
        kind = re.search(rf"plugins new {name} --kind (\S+)", text)[1]
        folder = "tests" if file.parts[1] == "tests" else f"molora_sample_{kind}"
        functions = (
            node.name
            for path in (TEMPLATES / folder).glob("*.py")
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef)
        )
        assert new.name in set(functions)
