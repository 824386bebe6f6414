"""The study of docs/studies.md is real: it plans, its action runs, its summary holds."""

import re
import sys
import types
from pathlib import Path

from molora_studies.framework.registry import check_study
from molora_studies.framework.results import PlannedStudy
from molora_studies.framework.worker import run_task

PAGE = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()


def test_the_example_study_runs(tmp_path, monkeypatch):
    module = types.ModuleType("my_package.study")
    monkeypatch.setitem(sys.modules, "my_package", types.ModuleType("my_package"))
    monkeypatch.setitem(sys.modules, "my_package.study", module)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(compile(example, "studies.md", "exec"), vars(module))
    study = module.LongerIsBetter
    assert check_study(study) is None
    options = study.Options()
    cache = tmp_path / "cache"
    planned = PlannedStudy("longer", "page", study, options, study.plan(options), cache)
    assert all(run_task(task, cache) for task in planned.tasks)
    document = planned.write(tmp_path / "out").document
    assert document["summary"]["claims"][0]["verdict"] == "holds"


def test_the_page_names_every_option():
    from molora_cli.main import build_command
    from molora_studies.command import study

    options = build_command("study", study).params
    flags = {flag for option in options for flag in option.opts if flag.startswith("--")}
    assert flags == set(re.findall(r"--[a-z]+", PAGE))
