"""`molora fuse`: receive contributions on this machine, fuse them, write the report."""

from pathlib import Path
from typing import Annotated

import typer

from molora_cli.output import note, show
from molora_cli.progress import reporting
from molora_cli.shared_options import Device, Dtype, ask_compute


def fuse(
    cooperative: Annotated[Path, typer.Option(help="A cooperative's folder.")],
    contributions: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders that `molora train` wrote; all admitted ones if none."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to put the result; the cooperative's folder if not given."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Admit contributions and fuse them into one model, with a report."""
    from molora_fed.cooperative.cooperative import open_cooperative
    from molora_fed.cooperative.fuse import fuse_contributions
    from molora_fed.reporting.summary import build_summary

    opened = open_cooperative(cooperative, ask_compute(device, dtype))
    with reporting() as progress:
        fused = fuse_contributions(
            opened, contributions or (), out=out, on_phase=progress.phase, progress=progress
        )
    show(build_summary(fused.result.result))
    for one in fused.left_out:
        reasons = [refusal.found for refusal in one.decision.refusals] if one.decision else []
        note(f"left out, now {one.state}: {one.contributor}: {' '.join(reasons)}")
    print(f"report       {fused.report}")
    print(f"fused model  {fused.result.fused_folder}")
    print(f"Try `molora generate {fused.result.fused_folder} --prompt TEXT`.")
