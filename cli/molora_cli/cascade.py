"""`molora cascade`: answer tasks, escalating where samples disagree, and report on it."""

from pathlib import Path
from typing import Annotated

import typer

from molora_cli import cascade_tasks
from molora_cli.progress import reporting
from molora_cli.shared_options import Device, Dtype, ask_compute
from molora_fed.storage.untrusted import clean

app = typer.Typer(
    help="Answer tasks: probe cheaply, escalate where samples disagree.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command("tasks")(cascade_tasks.tasks)


@app.command("run")
def run(
    config: Annotated[Path, typer.Argument(help="TOML file that describes the cascade.")],
    tasks: Annotated[Path, typer.Option(help="JSON lines, one task each.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; the same command resumes there.")],
    key: Annotated[
        Path | None,
        typer.Option(help="Key that signs the trace; made in OUT/keys if none is given."),
    ] = None,
    survey: Annotated[
        bool,
        typer.Option(
            "--survey", help="Ask every member on every task beside, to compare configurations."
        ),
    ] = False,
    no_times: Annotated[
        bool,
        typer.Option("--no-times", help="Record no wall times: same inputs, same bytes."),
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Answer tasks and record every decision in a signed trace."""
    from molora_fed.cascade.session import load_cascade, run_in_folder
    from molora_fed.cascade.task_files import load_tasks
    from molora_fed.storage.keys import load_key, load_or_make_key

    asked = load_tasks(tasks)
    signing = load_key(key) if key else load_or_make_key(out / "keys" / "coordinator.pem")
    with reporting("loading the models") as progress:
        cascade = load_cascade(config, asked, compute=ask_compute(device, dtype))
        progress.phase("answering")
        result = run_in_folder(
            cascade,
            asked,
            out,
            key=signing,
            survey=survey,
            with_times=not no_times,
            progress=progress,
        )
    totals = result.totals
    print(f"answered {totals.tasks - totals.failed} of {totals.tasks} tasks")
    if totals.known:
        print(f"accuracy {100 * totals.correct / totals.known:.1f} % of {totals.known}")
    price = f", price {totals.price:.4f}" if totals.price else ""
    print(f"cost     {totals.flops:.4g} operations{price}")
    print(f"replayed {result.replay.decisions} decisions from the record")
    print(f"root     {result.root}  (keep it elsewhere: it shows if the trace is rolled back)")
    print(f"trace    {out / 'trace'}, key {out / 'public.pem'}")
    if result.replay.differences:
        first = result.replay.differences[0]
        from molora_fed.errors import CascadeError

        raise CascadeError(
            f"Cannot trust run '{out}': expected the same decisions from its record, got "
            f"{len(result.replay.differences)} that differ: {first}. Is an extractor or judge "
            "not deterministic?"
        )


@app.command("report")
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(help="Runs over the same tasks; the first one is the page's subject."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the page; report/ in the first run if none.")
    ] = None,
) -> None:
    """Write a page about runs: accuracy by cost, escalation, agreement, attribution."""
    from molora_fed.cascade.summary import summarise_runs
    from molora_fed.reporting.cascade import write_cascade_report

    summary = summarise_runs(folders)
    page = write_cascade_report(summary, out or folders[0] / "report")
    for name, one in summary["configurations"].items():
        accuracy = one["accuracy"]
        if accuracy is not None:
            print(
                f"{clean(name):<24} {100 * accuracy['point']:5.1f} % "
                f"({100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f}), "
                f"{one['flops']:.3g} operations a task"
            )
    print(f"report   {page}")
