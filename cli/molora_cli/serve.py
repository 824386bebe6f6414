"""`molora serve`: a cooperative's server."""

from pathlib import Path
from typing import Annotated

import typer

from molora_cli.live import watching

DEFAULT_PORT = 8_080


def serve(
    cooperative: Annotated[Path, typer.Argument(help="Folder that `molora coop create` made.")],
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on.")] = DEFAULT_PORT,
    host: Annotated[str, typer.Option(help="Loopback address to listen on.")] = "127.0.0.1",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of admission and fusing; all cores if not given."),
    ] = None,
) -> None:
    """Serve a cooperative until Ctrl-C; run the same command again to resume."""
    from molora_fed.federation.server import serve as run_server

    with watching(f"Cooperative in {cooperative}, server {host}:{port}") as board:
        run_server(cooperative, port, board, host=host, threads=threads)
