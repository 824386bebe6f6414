"""`molora fuse`: receive contributions on this machine, fuse them, write the report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molora_cli.output import note, show
from molora_cli.progress import reporting
from molora_cli.shared_options import Device, Dtype, ask_compute

if TYPE_CHECKING:
    from molora_fed.cooperative.cooperative import Cooperative


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
    router: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Try another router than the charter's on all that is admitted; nothing is "
            "published or recorded.",
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Admit contributions and fuse them into one model, with a report."""
    from molora_fed.cooperative.cooperative import open_cooperative
    from molora_fed.cooperative.fuse import fuse_contributions
    from molora_fed.reporting.summary import build_summary

    opened = open_cooperative(cooperative, ask_compute(device, dtype))
    if router is not None:
        _try_router(opened, router, contributions or [], out)
        return
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


def _try_router(
    cooperative: "Cooperative", router: str, contributions: list[Path], out: Path | None
) -> None:
    from molora_fed.cooperative.fuse import try_router
    from molora_fed.errors import ConfigError
    from molora_fed.reporting.summary import build_summary

    if contributions:
        raise ConfigError(
            f"Cannot try router '{router}': expected no contributions, since it is tried on all "
            f"that is admitted, got {len(contributions)}. Admit them with `molora coop admit`."
        )
    chosen = cooperative.charter.amendment.fusion
    with reporting() as progress:
        tried = try_router(cooperative, router, out=out, on_phase=progress.phase, progress=progress)
    show(build_summary(tried.result))
    if chosen.options:
        note(f"note: router '{chosen.router}' was measured here with its default options.")
    note(
        f"note: a trial on held-out text; router '{chosen.router}' stays the charter's, nothing is "
        "published or recorded."
    )
    print(f"fused model  {tried.fused_folder}")
    folder = cooperative.folder
    print(f"Publish with it: `molora coop amend {folder} --set fusion.router={router}`, then fuse.")
