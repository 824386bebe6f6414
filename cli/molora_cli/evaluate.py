"""`molora evaluate`: a fused or evolved model on one's own text."""

from pathlib import Path
from typing import Annotated

import typer

from molora_cli.output import show
from molora_cli.progress import reporting
from molora_cli.shared_options import Device, Dtype, TextField, ask_compute


def evaluate(
    fused: Annotated[Path, typer.Argument(help="Folder of a fused or evolved model.")],
    data: Annotated[
        list[str], typer.Option(help="NAME=PATH of text no one trained on; repeatable.")
    ],
    text_field: TextField = "",
    block_size: Annotated[int, typer.Option(min=8, help="Tokens per block.")] = 128,
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base, if it is elsewhere.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 42,
) -> None:
    """Measure base, specialists or slots, and the model on your own text."""
    from molora_fed.corpus.records import TextOptions
    from molora_fed.inference.opening import open_model
    from molora_fed.inference.texts import evaluate_texts
    from molora_fed.reporting.summary import build_loss_table
    from molora_fed.storage.values import parse_data

    texts = parse_data(data)
    with reporting("loading the model") as progress:
        model = open_model(
            fused,
            kinds=("fused", "evolved"),
            base_folder=base,
            compute=ask_compute(device, dtype),
        )
        evaluation = evaluate_texts(
            model,
            texts,
            block_size=block_size,
            text=TextOptions(text_field),
            seed=seed,
            on_phase=progress.phase,
            progress=progress,
        )
    result = evaluation.to_json() | {"domains": list(texts)}
    (result["router"],) = result["losses"]["fused"]
    show(
        build_loss_table(result),
        f"Best alone: {result['best_alone']['name']}. Intervals are by document cluster, of which "
        f"there are {len(evaluation.clusters.counts)}.",
    )
