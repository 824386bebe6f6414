"""`molora api`: a model behind an API that clients of OpenAI's understand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from molora_cli.output import note
from molora_cli.shared_options import Device, Dtype, Experts, ask_compute, ask_experts


def api(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a fused or evolved model, a specialist or a base.")
    ],
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port; 0 takes a free one.")] = 8_000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    key_file: Annotated[
        Path | None, typer.Option(help="File of keys that may ask, one a line.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let other machines ask without a key.")
    ] = False,
    texts: Annotated[int, typer.Option(min=1, help="Texts that are written at once.")] = 64,
    waiting: Annotated[
        int, typer.Option(min=0, help="Prompts that wait at once; more are refused.")
    ] = 128,
    connections: Annotated[int, typer.Option(min=1, help="Open connections at once.")] = 512,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 4_096,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens added to a prompt.")] = 1_024,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 2**20,
    body_seconds: Annotated[float, typer.Option(min=0.1, help="Time a request's body has.")] = 15.0,
    request_seconds: Annotated[
        float, typer.Option(min=0.1, help="Time from a request to the end of its answer.")
    ] = 300.0,
    finish_seconds: Annotated[
        int, typer.Option(min=0, help="Time that running texts have after SIGTERM.")
    ] = 30,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of torch; all cores if not given.")
    ] = None,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="A line for each answer, without its texts.")
    ] = False,
    experts: Experts = None,
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base, if it is elsewhere.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Serve a model as OpenAI's API until Ctrl-C or SIGTERM; what runs is finished."""
    from molora_fed.serving.api import Limits
    from molora_fed.serving.server import ApiSettings, serve_api

    settings = ApiSettings(
        host=host,
        port=port,
        key_file=key_file,
        insecure=insecure,
        max_texts=texts,
        max_waiting=waiting,
        max_connections=connections,
        finish_seconds=finish_seconds,
        threads=threads,
        experts_per_text=ask_experts(experts),
        limits=Limits(
            body_bytes=max_body_bytes,
            body_seconds=body_seconds,
            request_seconds=request_seconds,
            prompt_tokens=max_prompt_tokens,
            new_tokens=max_new_tokens,
        ),
    )

    def tell(address: str, names: Sequence[str]) -> None:
        print(f"serving {address}: {', '.join(names)}", flush=True)

    serve_api(
        folder,
        settings,
        base_folder=base,
        compute=ask_compute(device, dtype),
        on_ready=tell,
        log=note if log_requests else lambda line: None,
    )
    note("stopped")
