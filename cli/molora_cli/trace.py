"""`molora trace`: look at a decision trace, and check it with nothing but a public key."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molora_cli.output import MAX_LINE, note, print_columns
from molora_cli.shared_options import Device, Dtype, ask_compute
from molora_fed.storage.untrusted import clean, clean_lines

if TYPE_CHECKING:
    from molora_fed.tracing.records import Record

__all__ = ["app"]

app = typer.Typer(help="Look at decision traces and check them.", no_args_is_help=True)

Trace = Annotated[Path, typer.Argument(help="Folder of a run, or the one file of a sealed run.")]
LINE_WIDTH = 160
MAX_KEY_BYTES = 4_096


@app.command()
def show(
    path: Trace,
    kind: Annotated[str | None, typer.Option(help="Only records of this kind.")] = None,
    task: Annotated[str | None, typer.Option(help="Only records about this task.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Stop after so many.")] = 50,
    whole: Annotated[bool, typer.Option("--whole", help="Whole bodies, not cut.")] = False,
) -> None:
    """Print records in the order of the run; nothing is checked."""
    from molora_fed.tracing.reading import read_records

    shown = 0
    for record in read_records(path):
        if kind not in (None, record.kind) or task not in (None, record.body.get("task")):
            continue
        if shown == limit:
            note(f"more than {limit} records: show them with a higher --limit")
            break
        print(_format(record, whole=whole))
        shown += 1


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="A run's folder, a sealed run's file, or a proof.")],
    key: Annotated[Path, typer.Option(help="Public key that signed the run, PEM file.")],
    root: Annotated[
        str | None, typer.Option(help="Root kept elsewhere, hex: finds a run that was put back.")
    ] = None,
    sealed: Annotated[bool, typer.Option("--sealed", help="An open run is wrong too.")] = False,
) -> None:
    """Check every record; says where something is wrong, and exits 1 then."""
    from molora_fed.tracing.proofs import read_proof
    from molora_fed.tracing.verifying import verify as check

    public = _read_key(key)
    proof = read_proof(path)
    if proof is not None:
        _verify_proof(proof, public, root)
        return
    report = check(path, public, root)
    for each in report.notes:
        print(f"note   {clean(each, MAX_LINE)}")
    for problem in report.problems:
        print(f"wrong  {clean(problem, MAX_LINE)}")
    print(
        f"run {clean(report.run or '?')}: {report.records:,} records, {report.covered:,} signed for"
    )
    if report.sealed:
        print(f"sealed, root {report.root}")
    else:
        print("open: a later state may be missing, and what no checkpoint signs may have changed")
        for signed in report.checkpoints:
            print(
                f"checkpoint after {signed.count:,} records of {clean(signed.file)}, root "
                f"{clean(signed.root)}"
            )
    if not report.ok or (sealed and not report.sealed):
        raise typer.Exit(1)


@app.command()
def prove(
    path: Trace,
    record: Annotated[int, typer.Option(min=0, help="Number of the record, as `show` prints it.")],
    out: Annotated[Path, typer.Option(help="File to write; give it to `molora trace verify`.")],
) -> None:
    """Write the proof that one record is in a sealed run; it shows no other record."""
    from molora_fed.storage.files import write_json
    from molora_fed.tracing.proofs import build_proof

    proof = build_proof(path, record)
    write_json(out, proof)
    print(f"{out}: record {record}, {len(proof['path'])} hashes to root {proof['seal']['root']}")


@app.command()
def stats(path: Trace) -> None:
    """Count records by kind and writer; nothing is checked."""
    from molora_fed.tracing.reading import count_trace
    from molora_fed.tracing.records import encode_json

    counts = count_trace(path)
    runs = clean(encode_json(counts.runs))
    print(f"run {runs}: {counts.records:,} records in {counts.segments} segments")
    print_columns(("kind", "records"), [(k, f"{n:,}") for k, n in counts.kinds.items()])
    print()
    print_columns(("writer", "records"), [(w, f"{n:,}") for w, n in counts.writers.items()])
    for torn in counts.recovered:
        print(f"torn  {clean(encode_json(torn), MAX_LINE)}")


@app.command()
def replay(
    path: Trace,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML of the cascade: its local models are asked again, too."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Make every decision again from its recorded samples; exits 1 if one comes out otherwise."""
    from molora_fed.cascade.building import build_models
    from molora_fed.cascade.config import load_config
    from molora_fed.cascade.replay import replay_trace
    from molora_fed.plugins import get_plugins

    plugins = get_plugins()
    models = None
    if config:
        compute = ask_compute(device, dtype)
        models = build_models(load_config(config), config.parent, plugins, compute)
    report = replay_trace(path, models=models, plugins=plugins)
    for difference in report.differences:
        print(f"differs  {clean(difference, MAX_LINE)}")
    asked = f", {report.resampled:,} samples asked again" if config else ""
    print(f"{report.decisions:,} decisions{asked}, {len(report.differences):,} differences")
    if report.differences:
        raise typer.Exit(1)


@app.command()
def record(
    cooperative: Annotated[Path, typer.Argument(help="A cooperative's folder.")],
) -> None:
    """Record what a cooperative decided since the last time, into a trace that others can audit."""
    from molora_fed.cooperative.audit import record_cooperative
    from molora_fed.cooperative.cooperative import open_cooperative

    done = record_cooperative(open_cooperative(cooperative))
    print(f"trace  {done.folder}: {done.added:,} new events, {done.total:,} in all")
    print(f"root   {done.root}")
    print(f"Keep the root elsewhere. Others check with `molora trace verify {done.folder} --key")
    print(f"{done.key_file}`, and should have the key from you by another way.")


def _format(record: "Record", *, whole: bool) -> str:
    from molora_fed.tracing.records import encode_json

    body = clean_lines(encode_json(record.body))
    text = f"{record.number}  {clean(record.writer)}  {clean(record.kind)}  {body}"
    return text if whole or len(text) <= LINE_WIDTH else f"{text[: LINE_WIDTH - 3]}..."


def _verify_proof(proof: dict[str, object], public: str, root: str | None) -> None:
    from molora_fed.errors import TraceError
    from molora_fed.tracing.proofs import check_proof
    from molora_fed.tracing.records import encode_json

    try:
        proven = check_proof(proof, public, root)
    except TraceError as error:
        print(f"wrong  {clean(error, MAX_LINE)}")
        raise typer.Exit(1) from error
    print(clean_lines(encode_json(proven.body)))
    kind, run = clean(proven.kind), clean(proven.run)
    print(f"record {proven.number} of {proven.count:,} ({kind}) of run {run}")
    print(f"sealed, root {proven.root}")


def _read_key(path: Path) -> str:
    from molora_fed.errors import SignatureError

    try:
        with path.open("rb") as file:
            return file.read(MAX_KEY_BYTES + 1).decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "other bytes"
        raise SignatureError(
            f"Cannot use key '{path}': expected a public key in PEM form, got {reason}. "
            "Ask the coordinator for the run's key."
        ) from error
