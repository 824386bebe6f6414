"""`molora generate`: text from a fused or an evolved model."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from molora_cli.output import note
from molora_cli.progress import reporting
from molora_cli.shared_options import Device, Dtype, Experts, ask_compute, ask_experts
from molora_fed.storage.untrusted import clean_lines


class Evidence(StrEnum):
    """Tokens whose evidence steers the gates."""

    PROMPT = "prompt"
    ALL = "all"


def generate(
    fused: Annotated[Path, typer.Argument(help="Folder of a fused or evolved model.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Keep tokens up to this probability.")
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(min=0, help="Keep the k likeliest tokens; 0 keeps all.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    evidence_from: Annotated[
        Evidence, typer.Option(help="Whether gates go on learning from the generated tokens.")
    ] = Evidence.ALL,
    experts: Experts = None,
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base, if it is elsewhere.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Continue a text with a fused or an evolved model."""
    from molora_fed.inference.fused_build import open_causal_lm
    from molora_fed.inference.generate import Sampling
    from molora_fed.inference.generate import generate as generate_text

    sampling = Sampling(
        max_new_tokens, temperature, top_k, top_p, seed, evidence_from.value, ask_experts(experts)
    )
    with reporting("loading the model", transient=True) as progress:
        model = open_causal_lm(
            fused,
            kinds=("fused", "evolved"),
            base_folder=base,
            compute=ask_compute(device, dtype),
        )
        progress.phase("generating")
        (generation,) = generate_text(model, prompt, sampling, progress=progress)
    text = generation.prompt + generation.text
    # A terminal obeys what it is shown; a file takes every character as it is.
    print(clean_lines(text) if sys.stdout.isatty() else text)
    gates = sorted(generation.gates.items(), key=lambda item: -item[1])
    note("gates: " + ", ".join(f"{name} {gate:.2f}" for name, gate in gates))
