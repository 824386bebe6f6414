"""A small run of `molora cascade`, sealed: the sample trace that anybody can verify and replay.

`python bench/acar_sample.py --out docs/results/acar [--count 3]`

Takes the models of the study `acar`'s first seed from the cache (`molora study acar` makes them),
answers a few test tasks of every family and level by the real commands, and verifies and replays
the trace in processes of their own. Writes FOLDER/sample-trace.jsonl, sample-trace.pem and
sample-trace.md.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from molora_acar.tasks.families import FAMILIES
from molora_studies.acar.recipe import AcarOptions, plan_answers
from molora_studies.framework.store import TaskStore

from molora_fed.cascade.task_files import save_tasks
from molora_fed.storage.files import write_bytes
from molora_fed.storage.values import find_cache_folder
from molora_fed.tracing.verifying import export_run

NAME = "sample-trace"
HEAD = """[cascade]
probe = "probe"
members = [{members}]
samples = {samples}
temperature = {temperature}
policy = "sigma"
judge = "likelihood"
max_new_tokens = 64
stop = ["\\n"]
[cascade.judge_options]
model = "base"
[models.probe]
kind = "base"
path = "probe"
[models.base]
kind = "base"
path = "base"
"""
MEMBER = """[models.{name}]
kind = "specialist"
path = "{name}"
base = "base"
"""


def prepare(folder: Path, options: AcarOptions, count: int) -> None:
    """Put models, description and tasks into a folder."""
    task = plan_answers(options, options.seeds[0])
    store = TaskStore.in_cache(find_cache_folder())
    base, probe, *specialists = (store.read(need)[0].folder for need in task.needs)
    names = list(task.settings["members"])
    shutil.copytree(base / "base", folder / "base")
    shutil.copytree(probe / "base", folder / "probe")
    for name, found in zip(names, specialists, strict=True):
        shutil.copytree(found / "adapter", folder / name)
    text = HEAD.format(
        members=", ".join(f'"{name}"' for name in names),
        samples=options.samples,
        temperature=options.temperature,
    )
    text += "".join(MEMBER.format(name=name) for name in names)
    write_bytes(folder / "cascade.toml", text.encode())
    tasks = [
        drawn
        for name, levels in sorted(options.levels.items())
        for level in levels
        for drawn in FAMILIES[name](level, count, options.seeds[0])
    ]
    save_tasks(tasks, folder / "tasks.jsonl")


def call(folder: Path, *arguments: str) -> str:
    """Run a `molora` command in a process of its own and tell what it said.

    Raises:
        SystemExit: If it fails.
    """
    command = [sys.executable, "-m", "molora_cli.main", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"molora {' '.join(arguments)}: {done.stdout}{done.stderr}")
    return f"$ molora {' '.join(arguments)}\n{done.stdout}"


def main() -> None:
    """Run, seal, verify, replay, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=3, help="Tasks of each family and level.")
    chosen = parser.parse_args()
    options = AcarOptions()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options, chosen.count)
        run = ("cascade", "run", "cascade.toml", "--tasks", "tasks.jsonl", "--out", "run")
        said = [call(folder, *run, "--no-times")]
        export_run(folder / "run" / "trace", folder / f"{NAME}.jsonl")
        shutil.copyfile(folder / "run" / "public.pem", folder / f"{NAME}.pem")
        said.append(call(folder, "trace", "verify", f"{NAME}.jsonl", "--key", f"{NAME}.pem"))
        said.append(call(folder, "trace", "replay", f"{NAME}.jsonl"))
        said.append(call(folder, "trace", "replay", f"{NAME}.jsonl", "--config", "cascade.toml"))
        said.append(call(folder, "trace", "stats", f"{NAME}.jsonl"))
        chosen.out.mkdir(parents=True, exist_ok=True)
        for ending in ("jsonl", "pem"):
            shutil.copyfile(folder / f"{NAME}.{ending}", chosen.out / f"{NAME}.{ending}")
        page = (
            "# A sealed sample trace\n\n"
            "`python bench/acar_sample.py --out docs/results/acar`\n\n"
            f"Test tasks of the study [acar](acar.md), {chosen.count} of each family and level, "
            "answered by its models of the first seed. [The trace](sample-trace.jsonl) and "
            "[the key](sample-trace.pem) are all that verifying needs; asking the models again "
            "needs the models.\n\n```console\n" + "".join(said) + "```\n"
        )
        write_bytes(chosen.out / f"{NAME}.md", page.encode())


if __name__ == "__main__":
    main()
