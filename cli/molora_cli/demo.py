"""`molora demo`: a whole federation on this machine."""

import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Self

import typer

from molora_cli.live import Board, watching
from molora_cli.output import show
from molora_cli.progress import Reporter, reporting
from molora_cli.shared_options import Device, Dtype, Privacy, SummingWay, ask_compute

if TYPE_CHECKING:
    from molora_fed.federation.status import FederationEvent


class _View:
    """A bar for each phase outside the federation, and the live table inside it, in turn."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._reporter: Reporter | None = None
        self._board: Board | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def _close(self) -> None:
        self._open.close()
        self._reporter = self._board = None

    def phase(self, name: str) -> None:
        if self._reporter is None:
            self._close()
            self._reporter = self._open.enter_context(reporting())
        self._reporter.phase(name)

    def progress(self, done: int, total: int, **fields: float | str) -> None:
        if self._reporter is not None:
            self._reporter(done, total, **fields)

    def event(self, event: "FederationEvent") -> None:
        if self._board is None:
            self._close()
            self._board = self._open.enter_context(watching("Federation on this machine"))
        self._board(event)


def demo(
    domains: Annotated[
        str, typer.Option(help="Built-in domains, separated by commas; four if not given.")
    ] = "",
    contributors: Annotated[
        int | None, typer.Option(min=2, help="Number of contributors; one a domain if not given.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of a specialist at most.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="Adapter kind.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 42,
    out: Annotated[Path, typer.Option(help="Folder for everything the run makes.")] = Path("demo"),
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=PATH: a contributor on your own files; repeatable. Without --domains only "
            "these take part."
        ),
    ] = None,
    control: Annotated[
        bool,
        typer.Option(
            "--control",
            help="Also train on everybody's text pooled, for as many steps in all: one adapter of "
            "the linear layers, and all parameters of the base.",
        ),
    ] = False,
    base: Annotated[
        str, typer.Option(help="builtin, ID@REVISION of the Hugging Face Hub, or a folder.")
    ] = "builtin",
    base_steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of the built-in base.")
    ] = None,
    privacy: Privacy = None,
    summing: SummingWay = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Run a whole cooperative on this machine: server, contributors, fused model, report."""
    from molora_fed.charter import choose_privacy
    from molora_fed.demo.run import DemoOptions, run_demo
    from molora_fed.reporting.summary import build_sample_text, build_summary, build_time_table
    from molora_fed.storage.values import find_cache_folder, parse_data, parse_names

    options = DemoOptions(
        domains=parse_names(domains) if domains else (),
        data=parse_data(data or []),
        contributors=contributors,
        steps=steps,
        kind=kind,
        seed=seed,
        out=out,
        control=control,
        command=shlex.join(["molora", *sys.argv[1:]]),
        base=base,
        base_steps=base_steps,
        cache=find_cache_folder(),
        compute=ask_compute(device, dtype),
        privacy=choose_privacy("demo", privacy, summing),
    )
    with _View() as view:
        done = run_demo(options, view)
    show(build_summary(done.result))
    show(*(build_sample_text(sample) for sample in done.result["samples"]))
    show(build_time_table(done.seconds, done.result["budget_seconds"]))
    print(f"report       {done.report}")
    print(f"fused model  {done.fused}")
    print(f"Try `molora generate {done.fused} --prompt TEXT`.")
