"""`molora serve`: a cooperative's server."""

import os
from pathlib import Path
from typing import Annotated

import typer

from molora_cli.live import watching
from molora_cli.shared_options import Device, Dtype, ask_compute

DEFAULT_PORT = 8_080


def serve(
    cooperative: Annotated[Path, typer.Argument(help="Folder that `molora coop create` made.")],
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on.")] = DEFAULT_PORT,
    host: Annotated[
        str, typer.Option(help="Address to listen on; with --address all of this machine's.")
    ] = "",
    address: Annotated[
        str,
        typer.Option(help="HOST or HOST:PORT by which members reach it; kept for invitations."),
    ] = "",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of admission and fusing; all cores if not given."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65_535,
            help="Port of this machine for /healthz and /metrics; none if not given.",
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without TLS and invitations; on this machine only.")
    ] = False,
) -> None:
    """Serve a cooperative until Ctrl-C; run the same command again to resume."""
    from molora_fed.errors import ConfigError
    from molora_fed.federation.homes import CoordinatorHome
    from molora_fed.federation.invitations import keep_address
    from molora_fed.federation.server import serve as run_server

    os.umask(0o077)
    names: tuple[str, ...] | None = None
    if insecure:
        if address:
            raise ConfigError(
                "Cannot serve without TLS at an address: expected --insecure or --address, got "
                "both. Leave --insecure out."
            )
    else:
        names = keep_address(CoordinatorHome(cooperative), address, port)
    host = host or ("0.0.0.0" if address else "127.0.0.1")
    with watching(f"Cooperative in {cooperative}, server {host}:{port}") as board:
        run_server(
            cooperative,
            port,
            board,
            host=host,
            names=names,
            threads=threads,
            compute=ask_compute(device, dtype),
            metrics_port=metrics_port,
        )
