"""Options that several commands have: text, where models run, how a contributor trains."""

from typing import TYPE_CHECKING, Annotated

import typer

from molora_cli.output import MAX_LINE
from molora_fed.storage.untrusted import clean
from molora_fed.types import ExpertsPerText, LossOn

if TYPE_CHECKING:
    from molora_fed.storage.compute import Compute
    from molora_fed.training.choices import TrainingChoices

__all__ = [
    "Accumulation",
    "Batch",
    "Checkpointing",
    "CountedTokens",
    "Device",
    "DomainOption",
    "Dtype",
    "Experts",
    "Launcher",
    "LearningRate",
    "Privacy",
    "ResetDocuments",
    "Steps",
    "SummingWay",
    "TextField",
    "ValidateEvery",
    "ask_compute",
    "ask_experts",
    "ask_training",
]

_DIGITS = 10
"""Of a number that somebody may give."""

Privacy = Annotated[
    str | None,
    typer.Option(
        help="What leaves contributors beside adapters: private, sums over their text and no "
        "text; statistics of the base's hidden states, once, and sums that measure; or pooled, "
        "samples of text. It can never change; private if not given."
    ),
]
SummingWay = Annotated[
    str | None,
    typer.Option(
        help="How sums are added up: masked, so that only totals over three members are seen; "
        "or robust, so that a few wrong ones do no harm. It can never change."
    ),
]
TextField = Annotated[
    str,
    typer.Option(help="Field of records that holds the text, e.g. post.body; found by name."),
]
DomainOption = Annotated[
    list[str] | None,
    typer.Option(help="Option of the registered domain, KEY=VALUE; repeatable."),
]
CountedTokens = Annotated[
    LossOn,
    typer.Option(help="assistant: only its replies, and responses, count in the training."),
]
Device = Annotated[
    str | None,
    typer.Option(help="auto, cpu, cuda or cuda:N; the home's settings if not given."),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="auto, float32 or bfloat16; the home's settings if not given."),
]
Experts = Annotated[
    str | None,
    typer.Option(
        help="So many of the best experts go on after the prompt, or 'merged': all of them as "
        "one model. All on their own if not given."
    ),
]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Training steps; the charter's if not given.")
]
Batch = Annotated[
    int | None, typer.Option(min=1, help="Blocks per step; the charter's if not given.")
]
LearningRate = Annotated[
    float | None,
    typer.Option(min=0, help="Peak learning rate; the charter's or the kind's if not given."),
]
ValidateEvery = Annotated[
    int | None,
    typer.Option(min=1, help="Steps between validations; the charter's if not given."),
]
Accumulation = Annotated[
    int, typer.Option(min=1, help="Parts in which a step is computed: more take less memory.")
]
Checkpointing = Annotated[
    bool,
    typer.Option(
        "--checkpointing",
        help="Compute activations again instead of keeping them: less memory, more time.",
    ),
]
ResetDocuments = Annotated[
    bool,
    typer.Option(
        "--reset-documents",
        help="Train on each document of a block alone: it sees no other, positions start at 0.",
    ),
]
Launcher = Annotated[
    str,
    typer.Option(
        help="Command that starts the training's processes, e.g. 'accelerate launch --multi_gpu'."
    ),
]


def ask_compute(device: str | None, dtype: str | None) -> "Compute":
    """What the two options ask for.

    Raises:
        ComputeError: If a value is unknown.
    """
    from molora_fed.storage.compute import Compute

    return Compute.parse(device, dtype)


def ask_experts(given: str | None) -> ExpertsPerText | None:
    """Who goes on after a prompt.

    Raises:
        BadParameter: If it is neither a number of experts nor "merged".
    """
    if given is None:
        return None
    if given == "merged":
        return "merged"
    if given.isascii() and given.isdecimal() and len(given) < _DIGITS and int(given) >= 1:
        return int(given)
    raise typer.BadParameter(
        f"expected a number from 1 on or 'merged', got '{clean(given, MAX_LINE)}'.",
        param_hint="--experts",
    )


def ask_training(
    *,
    steps: int | None,
    batch: int | None,
    learning_rate: float | None,
    validate_every: int | None,
    accumulation: int,
    checkpointing: bool,
    reset_documents: bool,
    launcher: str,
) -> "TrainingChoices":
    """What the options of a training ask for.

    Raises:
        ConfigError: If a value is out of range, or there is no such launcher.
    """
    from molora_fed.errors import ConfigError
    from molora_fed.storage.settings import check_options
    from molora_fed.training.choices import TrainingChoices

    chosen = check_options(
        TrainingChoices,
        {
            "steps": steps,
            "batch": batch,
            "learning_rate": learning_rate,
            "validate_every": validate_every,
            "accumulation": accumulation,
            "checkpointing": checkpointing,
            "reset_documents": reset_documents,
            "launcher": launcher,
        },
        what="Cannot train",
        error=ConfigError,
        fix="Correct these options.",
    )
    chosen.split_launcher()
    return chosen
