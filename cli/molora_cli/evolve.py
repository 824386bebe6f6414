"""`molora evolve`: a population out of a cooperative's contributions, and its lineage."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
from typer.core import TyperGroup

from molora_cli.output import print_columns, show
from molora_cli.progress import reporting
from molora_cli.shared_options import Device, Dtype, ask_compute

if TYPE_CHECKING:
    from molora_fed.population.evolution import Evolved

_RUN = "run"


class _Group(TyperGroup):
    """What is no command is a cooperative to evolve: `molora evolve COOPERATIVE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = [_RUN, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    help="Evolve a population: `molora evolve COOPERATIVE`, the same as `molora evolve run`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def _group() -> None:
    """Evolve a population: `molora evolve COOPERATIVE`, the same as `molora evolve run`."""


@app.command(_RUN)
def run(
    cooperative: Annotated[Path, typer.Argument(help="A cooperative's folder.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Where everything is kept; evolution/ of the folder if not given."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Torch threads of adaptation.")] = 1,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Evolve the admitted contributions as [amendment.population] says; safe to interrupt."""
    from molora_fed.cooperative.cooperative import open_cooperative
    from molora_fed.cooperative.evolve import evolve_cooperative
    from molora_fed.reporting.summary import build_loss_table

    opened = open_cooperative(cooperative, ask_compute(device, dtype))
    with reporting() as progress:
        done, page = evolve_cooperative(
            opened, out=out, threads=threads, on_phase=progress.phase, progress=progress
        )
    show(build_loss_table(done.result))
    _print_generations(done.evolved)
    print(f"report         {page}")
    print(f"evolved model  {done.model_folder}")
    print(f"Try `molora generate {done.model_folder} --prompt TEXT`.")


def _print_generations(evolved: "Evolved") -> None:
    rows = []
    for one in evolved.generations[1:]:
        compared = one.comparison
        guard = "not asked" if compared is None else f"{compared['bound']:+.4f}"
        rows.append(
            (
                str(one.number),
                str(len(one.newborns)),
                guard,
                "yes" if one.kept else "no, the twin",
                "; ".join(one.events) or "nothing happened",
            )
        )
    header = ("generation", "newborns", "harm at most, nats", "kept", "events")
    print_columns(header, rows)


@app.command()
def lineage(
    folder: Annotated[Path, typer.Argument(help="Folder of an evolution, or a cooperative's.")],
    figure: Annotated[Path | None, typer.Option(help="Write the figure there, as PNG.")] = None,
) -> None:
    """Draw the tree of all adapters: parents, operator, seed, fitness before and after."""
    from molora_fed.population.lineage import read_lineage
    from molora_fed.reporting.lineage import build_lineage_tree, draw_lineage
    from molora_fed.storage.files import write_bytes

    name = "lineage.jsonl"
    inner = folder / "evolution" / name
    found = read_lineage(inner if inner.is_file() else folder / name)
    show(build_lineage_tree(found))
    if figure is not None:
        write_bytes(figure, draw_lineage(found))
        print(f"figure  {figure}")
