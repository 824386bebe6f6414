"""`molora study`: many small runs that answer one question."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from molora_cli.output import print_columns, show
from molora_cli.shared_options import Device, Dtype, ask_compute

from molora_studies.board import format_minutes, watching_study

if TYPE_CHECKING:
    from molora_fed.storage.compute import Compute
    from molora_studies.framework.results import PlannedStudy, StudyPlan, Written
    from molora_studies.framework.runner import State

DEFAULT_OUT = Path("studies")


def study(
    name: Annotated[str, typer.Argument(help="A study's name; see --list.")] = "",
    config: Annotated[Path | None, typer.Option(help="TOML file of its options.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the result, `studies` if not given; or the collected page."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Tasks at once; as many as cores if not given.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "",
    device: Device = None,
    dtype: Dtype = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what it would do, and stop.")] = False,
    summary: Annotated[
        bool, typer.Option("--summary", help="Write the result of finished tasks; run nothing.")
    ] = False,
    all_names: Annotated[bool, typer.Option("--list", help="List all studies.")] = False,
    collect: Annotated[
        Path | None, typer.Option(help="Gather the claims of all results in this folder.")
    ] = None,
    rejudge: Annotated[
        Path | None,
        typer.Option(help="Judge all results in this folder anew from their cells; run nothing."),
    ] = None,
) -> None:
    """Run a study: print its plan, do its tasks in parallel, write its result.

    Stopped and called again, it goes on: finished tasks are kept in the cache for all studies.
    """
    from molora_fed.errors import ConfigError

    if all_names:
        _list()
    elif collect is not None:
        _collect(collect, out)
    elif rejudge is not None:
        _rejudge(rejudge, out)
    elif not name:
        raise ConfigError(
            "Cannot run a study: expected its name, got none. `molora study --list` shows all."
        )
    else:
        planned = _plan(
            name, config, seeds, ask_compute(device, dtype) if device or dtype else None
        )
        if summary:
            _print_result(planned.write(out or DEFAULT_OUT))
            return
        from molora_fed.storage.values import count_cores

        cores = workers or count_cores()
        survey = planned.survey(cores)
        _print_plan(planned, survey)
        if plan:
            _print_tasks(survey)
        else:
            _run(planned, survey, out or DEFAULT_OUT)


def _list() -> None:
    from molora_studies.framework.registry import get_studies

    studies = get_studies()
    rows = [(entry.name, entry.summary) for entry in studies.registry]
    print_columns(("name", "summary"), rows)
    for failure in studies.failures:
        print(f"failed: {failure}")


def _collect(folder: Path, out: Path | None) -> None:
    from molora_fed.storage.files import write_bytes
    from molora_studies.framework.render import collect_claims

    page = collect_claims(folder, out.parent if out else folder)
    if out is None:
        sys.stdout.write(page)
    else:
        write_bytes(out, page.encode())
        print(f"page  {out}")


def _rejudge(folder: Path, out: Path | None) -> None:
    from molora_studies.framework.registry import get_studies
    from molora_studies.framework.rejudge import rejudge_folder

    for judged in rejudge_folder(folder, get_studies().registry, out or folder):
        print(f"wrote  {judged.written.files[0]}: {len(judged.changes)} verdicts changed")
        for change in judged.changes:
            print(f"  {change.before or 'new'} -> {change.after or 'gone'}: {change.claim}")


def _plan(name: str, config: Path | None, seeds: str, compute: "Compute | None") -> "PlannedStudy":
    from molora_fed.errors import ConfigError
    from molora_fed.storage.values import find_cache_folder, parse_names
    from molora_studies.framework.registry import get_studies
    from molora_studies.framework.results import plan_study

    changes: dict[str, Any] = {}
    if seeds:
        try:
            changes["seeds"] = [int(seed) for seed in parse_names(seeds)]
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"Cannot use seeds '{seeds}': expected whole numbers separated by commas, got "
                "something else. Write them like 42,137."
            ) from error
    registry, cache = get_studies().registry, find_cache_folder()
    return plan_study(name, registry, cache, config=config, compute=compute, **changes)


def _print_plan(planned: "PlannedStudy", survey: "StudyPlan") -> None:
    print(f"study  {planned.name}: {planned.study.title}")
    todo = len(survey.tasks) - len(survey.done)
    print(f"plan   {survey.cells} cells, {len(survey.tasks)} tasks: {len(survey.done)} done, "
          f"{todo} to do")  # fmt: skip
    if not todo:
        return
    core_seconds = sum(t.seconds for key, t in survey.tasks.items() if key not in survey.done)
    print(
        f"time   about {format_minutes(survey.seconds)} on {survey.workers} quiet cores "
        f"({format_minutes(core_seconds)} of one core)",
        flush=True,
    )


def _print_tasks(survey: "StudyPlan") -> None:
    rows = [
        ("done" if key in survey.done else format_minutes(task.seconds), key[:8], task.name)
        for key, task in survey.tasks.items()
    ]
    print()
    print_columns(("time", "key", "task"), rows)


def _run(planned: "PlannedStudy", survey: "StudyPlan", out: Path) -> None:
    started = time.perf_counter()
    with watching_study(f"Study '{planned.name}'") as board:
        state = planned.run(survey.workers, board)
    if state.failures:
        _fail(planned, state)
    _print_result(planned.write(out, seconds=round(time.perf_counter() - started, 3)))


def _fail(planned: "PlannedStudy", state: "State") -> None:
    from molora_fed.errors import StudyError

    first = state.failures[0]
    names = ", ".join(f"'{failure.task.name}'" for failure in state.failures)
    more = f" and {len(state.skipped)} left out that rest on these" if state.skipped else ""
    trace = f"See '{first.trace}'. " if first.trace else ""
    raise StudyError(
        f"Cannot finish study '{planned.name}': expected every task to be done, got "
        f"{len(state.failures)} failed{more}: {names}; first: {first.message.rstrip('.')}. "
        f"{trace}The same command repeats only these."
    )


def _print_result(written: "Written") -> None:
    from rich.table import Table

    summary = written.document["summary"]
    for content in summary["tables"][:1]:
        table = Table(title=content["title"], title_justify="left")
        for column in content["columns"]:
            table.add_column(column, overflow="fold")
        for row in content["rows"]:
            table.add_row(*row)
        show(table)
    for claim in summary["claims"]:
        print(f"{claim['verdict']}: {claim['claim']} Ours: {claim['measured']}.")
    for path in written.files:
        print(f"wrote  {path}")
