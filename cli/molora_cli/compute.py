"""Options of all commands that run a model: where, and in which dtype."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from molora_fed.storage.compute import Compute

__all__ = ["Device", "Dtype", "ask_compute"]

Device = Annotated[
    str | None,
    typer.Option(help="auto, cpu, cuda or cuda:N; the home's settings if not given."),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="auto, float32 or bfloat16; the home's settings if not given."),
]


def ask_compute(device: str | None, dtype: str | None) -> "Compute":
    """What the two options ask for.

    Raises:
        ComputeError: If a value is unknown.
    """
    from molora_fed.storage.compute import Compute

    return Compute.parse(device, dtype)
