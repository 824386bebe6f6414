"""What every training loop does with its optimiser: determinism, and the way to disk and back."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from molora_fed.training.checkpoints import Tensors

__all__ = [
    "copy_values",
    "read_tensors",
    "set_values",
    "write_tensors",
]


def copy_values(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The parameters' values now."""
    return [p.detach().clone() for p in parameters]


def set_values(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Put values into the parameters."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def read_tensors(
    parameters: Sequence[nn.Parameter], optimizer: Optimizer, best: Sequence[Tensor] = ()
) -> Tensors:
    """What a checkpoint keeps of a run.

    Args:
        parameters: All that are trained; each has been stepped at least once.
        optimizer: AdamW over them.
        best: Values at the lowest validation loss, where something is chosen by it.
    """
    states = [optimizer.state[p] for p in parameters]
    first = [state["exp_avg"] for state in states]
    second = [state["exp_avg_sq"] for state in states]
    return Tensors(parameters, first, second, best)


def write_tensors(
    parameters: Sequence[nn.Parameter], optimizer: Optimizer, step: int, tensors: Tensors
) -> None:
    """Put a checkpoint's values into parameters and optimiser.

    Args:
        parameters: All that are trained, in the checkpoint's order.
        optimizer: AdamW over them.
        step: Steps it had done.
        tensors: What the checkpoint kept.
    """
    set_values(parameters, tensors.parameters)
    moments = zip(parameters, tensors.exp_avg, tensors.exp_avg_sq, strict=True)
    for parameter, first, second in moments:
        device = parameter.device
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step), device=device),
            "exp_avg": first.to(device),
            "exp_avg_sq": second.to(device),
        }
