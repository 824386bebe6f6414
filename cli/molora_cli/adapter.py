"""`molora adapter`: whether an adapter made elsewhere can be used, and its normal form."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molora_cli.output import MAX_LINE, note
from molora_fed.storage.untrusted import clean

if TYPE_CHECKING:
    from molora_fed.adapters.inspection import AdapterReport

app = typer.Typer(
    help="Check or convert an adapter that another program made.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_Folder = Annotated[Path, typer.Argument(help="Folder with adapter_config.json and its weights.")]
_Base = Annotated[
    Path | None, typer.Option(help="Folder of the base, or of a cooperative or its base/.")
]


@app.command()
def check(
    folder: _Folder,
    base: _Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what an adapter is and what reading it takes, or why it cannot be used.

    Without --base headers are read and no tensor. The exit code is 0 if it can be used.
    """
    from molora_fed.adapters.inspection import inspect_folder, report_on_base
    from molora_fed.errors import AdapterError

    try:
        if base is None:
            report = inspect_folder(folder)
        else:
            found = _load_base(base)
            report, _ = report_on_base(
                folder, found.model, tokenizer=found.tokenizer, base=found.id
            )
    except AdapterError as error:
        if as_json:
            print(json.dumps({"usable": False, "refusal": clean(error, MAX_LINE)}))
            raise typer.Exit(error.exit_code) from error
        raise
    if as_json:
        print(json.dumps({"usable": True, **report.to_json()}, sort_keys=True))
        return
    for subject, text in _describe(report):
        print(f"{subject:<12}{clean(text, MAX_LINE)}")


@app.command()
def convert(
    folder: _Folder,
    out: Annotated[Path, typer.Argument(help="New or empty folder for the normal form.")],
    base: _Base = None,
    kind: Annotated[
        str,
        typer.Option(
            help="lora keeps the factors; svd or delta write the exact difference, e.g. of DoRA."
        ),
    ] = "lora",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of kind svd; 64.")] = None,
    drop_saved: Annotated[
        bool,
        typer.Option("--drop-saved", help="Leave out embeddings and head that were saved along."),
    ] = False,
) -> None:
    """Write an adapter in the normal form, which plain PEFT loads too."""
    from molora_fed.adapters.convert import convert_adapter

    found = None if base is None else _load_base(base)
    made = convert_adapter(
        folder,
        out,
        model=None if found is None else found.model,
        tokenizer=None if found is None else found.tokenizer,
        kind=kind,
        rank=rank,
        drop_saved=drop_saved,
    )
    for each in made.notes:
        note(each)
    if made.dropped:
        note(f"left out: {', '.join(made.dropped[:5])}")
    adapter = made.adapter
    print(
        f"{adapter.kind} of {len(adapter.updates)} modules, {made.changed} of them changed, "
        f"{adapter.num_bytes:,} bytes in {out}"
    )
    if kind == "svd":
        print(f"lost         {100 * made.loss_fraction:.3g} % of the difference, by Frobenius norm")
    if found is None:
        note("The names were not held against a base: pass --base to be sure that it fits.")


def _load_base(folder: Path) -> Any:
    from molora_fed.models.base import load_base

    inner = folder / "base"
    is_base = (folder / "config.json").is_file() or not inner.is_dir()
    return load_base(folder if is_base else inner)


def _count(values: Mapping[Any, int]) -> str:
    if len(values) == 1:
        return f"{next(iter(values)):g}"
    return ", ".join(f"{value:g} ({count} modules)" for value, count in values.items())


def _describe(report: "AdapterReport") -> list[tuple[str, str]]:
    """What there is to say, subject by subject."""
    claims = report.claims
    rows = [("usable", "yes" if report.base else "yes, as far as headers tell without a base")]
    rows.append(("kind", report.kind))
    if claims.tool or claims.peft_version:
        version = f"PEFT {claims.peft_version}" if claims.peft_version else ""
        tool = "" if claims.tool == "PEFT" else claims.tool
        rows.append(("made by", ", ".join(part for part in (tool, version) if part)))
    if report.ranks:
        rows.append(("rank", _count(report.ranks)))
        rows.append(("scale", f"{report.scale}, alpha {_count(report.alphas)}"))
    changed = "" if report.changed is None else f"{report.changed} changed of "
    rows.append(("modules", f"{changed}{report.modules}"))
    if report.targets:
        rows.append(("targets", report.targets))
    types = ", ".join(f"{count} tensors {name}" for name, count in report.precision.items())
    rows.append(("precision", types))
    rows.append(("bytes", f"{report.num_bytes:,}"))
    claimed = " ".join(part for part in (claims.base, claims.revision) if part)
    rows.append(("claims", f"trained on {claimed or 'a base that it does not name'}"))
    if report.base:
        rows.append(("base", f"names and shapes fit '{report.base}'"))
    if report.base_weights:
        rows.append(("fingerprint", f"of the base it was trained on: {report.base_weights[:16]}"))
    rows += [("note", each) for each in report.notes]
    if not report.is_normal:
        rows.append(("to do", "none: it is normalised where it is used, or by `adapter convert`"))
    return rows
