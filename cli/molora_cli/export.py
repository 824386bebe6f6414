"""`molora export`: a model in the forms that other programs load."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from molora_cli.output import note
from molora_cli.progress import reporting


class To(StrEnum):
    """Forms of an export."""

    PEFT = "peft"
    MERGED = "merged"
    GGUF = "gguf"


class As(StrEnum):
    """Forms of a merge."""

    ADAPTER = "adapter"
    CHECKPOINT = "checkpoint"


class FileDtype(StrEnum):
    """Dtypes of a GGUF base."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


def export(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a fused or evolved model, a specialist or a base.")
    ],
    to: Annotated[
        To,
        typer.Option(
            help="peft: a folder a specialist. merged: all in one. gguf: base and LoRA files for "
            "llama.cpp."
        ),
    ],
    out: Annotated[Path, typer.Option(help="New or empty folder.")],
    merge: Annotated[
        As, typer.Option("--as", help="Of merged: one adapter, or a whole checkpoint.")
    ] = As.ADAPTER,
    weights: Annotated[
        str | None,
        typer.Option(
            help="NAME=NUMBER,... of a merge or a mixture; the router's mean gates if not given, "
            "equal where no report has them."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Write dense differences as factors of this rank that come near."),
    ] = None,
    dtype: Annotated[
        FileDtype | None,
        typer.Option(help="Of a GGUF base; that of the base's files if not given."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base, if it is elsewhere.")
    ] = None,
) -> None:
    """Write a model in a form that PEFT, transformers or llama.cpp loads, with a README."""
    from molora_fed.cooperative.audit import find_trace_root
    from molora_fed.export.exporting import Choices, export_model
    from molora_fed.export.subject import open_subject

    choices = Choices(to.value, merge.value, weights, rank, None if dtype is None else dtype.value)
    with reporting("loading the model") as progress:
        subject = open_subject(folder, base_folder=base)
        done = export_model(
            subject,
            out,
            choices,
            trace_root=find_trace_root(folder),
            on_phase=progress.phase,
            progress=progress,
        )
    for each in done.notes:
        note(each)
    for name, what in done.rows:
        print(f"{name:<28}{what}")
    if done.weights is not None:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in done.weights.values.items())
        print(f"weights      {shown} ({done.weights.source})")
    print(f"README       {done.folder / 'README.md'}")
