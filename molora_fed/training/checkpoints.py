"""What a training run needs to go on after a kill: one safetensors file, replaced whole.

The file holds the trained parameters, AdamW's moments, the best parameters so far, and as metadata
the step reached and the run's identity: everything that decides the bytes of the result.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from molora_fed.errors import TrainingError
from molora_fed.storage.files import write_bytes
from molora_fed.types import Progress

__all__ = [
    "CheckpointStore",
    "Counters",
    "Metrics",
    "Tensors",
    "copy_values",
    "read_tensors",
    "set_values",
    "write_tensors",
]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Counters:
    """How far a run is.

    Attributes:
        step: Optimiser steps done.
        initial_loss: Validation loss before the first step, nats per token.
        best_step: Step of the lowest validation loss; 0 is the start.
        best_loss: That loss, nats per token.
        stale: Validations since then.
        stopped: True if patience ran out.
        threads: Torch threads of the run; kept when it is resumed.
    """

    step: int
    initial_loss: float
    best_step: int
    best_loss: float
    stale: int
    stopped: bool
    threads: int


@dataclass(frozen=True)
class Tensors:
    """The tensors of a run, each list in the order of its parameters.

    Attributes:
        parameters: Current values.
        exp_avg: AdamW's first moments.
        exp_avg_sq: AdamW's second moments.
        best: Values at the lowest validation loss; empty where nothing is chosen by it.
    """

    parameters: Sequence[Tensor]
    exp_avg: Sequence[Tensor]
    exp_avg_sq: Sequence[Tensor]
    best: Sequence[Tensor] = ()


def copy_values(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The parameters' values now."""
    return [p.detach().clone() for p in parameters]


def set_values(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Put values into the parameters."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def read_tensors(
    parameters: Sequence[nn.Parameter], optimizer: Optimizer, best: Sequence[Tensor]
) -> Tensors:
    """What a checkpoint keeps of a run.

    Args:
        parameters: All that are trained; each has been stepped at least once.
        optimizer: AdamW over them.
        best: Values at the lowest validation loss; empty where nothing is chosen by it.
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


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoint file of one run.

    Attributes:
        path: The file.
        identity: Everything that decides the bytes of the result, except threads.
    """

    path: Path
    identity: Mapping[str, Any]

    def save(self, counters: Counters, tensors: Tensors) -> None:
        """Replace the checkpoint.

        Raises:
            StorageError: On I/O errors; the former checkpoint stays.
        """
        named = {
            f"{name}.{index:05d}": tensor.detach().to("cpu").contiguous()
            for name, values in vars(tensors).items()
            for index, tensor in enumerate(values)
        }
        state = {
            "format_version": FORMAT_VERSION,
            "identity": self.identity,
            "counters": asdict(counters),
        }
        write_bytes(self.path, save(named, metadata={"state": json.dumps(state)}))

    def load(self, like: Sequence[Tensor]) -> tuple[Counters, Tensors] | None:
        """Read the checkpoint, or None if there is none.

        Args:
            like: The run's parameters; shapes and dtypes must agree.

        Raises:
            TrainingError: If the file is malformed, or belongs to other inputs, versions,
                hardware or dtype; all differences are named.
        """
        if not self.path.exists():
            return None
        what = f"Cannot resume training from '{self.path}'"
        again = "Remove that file to start again."
        try:
            with safe_open(self.path, framework="pt") as file:
                state = json.loads((file.metadata() or {})["state"])
                identity = state["identity"]
                self._check_identity(identity, what)
                counters = Counters(**state["counters"])
                kept = {key.partition(".")[0] for key in file.keys()}  # noqa: SIM118
                read = {
                    name: [file.get_tensor(f"{name}.{i:05d}") for i in range(len(like))]
                    for name in Tensors.__dataclass_fields__
                    if name != "best" or name in kept
                }
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, TrainingError):
                raise
            raise TrainingError(
                f"{what}: expected a checkpoint of this program, got {error}. {again}"
            ) from error
        for values in read.values():
            for got, wanted in zip(values, like, strict=True):
                if got.shape != wanted.shape or got.dtype != wanted.dtype:
                    raise TrainingError(
                        f"{what}: expected a tensor {tuple(wanted.shape)} {wanted.dtype}, "
                        f"got {tuple(got.shape)} {got.dtype}. {again}"
                    )
        return counters, Tensors(**read)

    def _check_identity(self, found: Mapping[str, Any], what: str) -> None:
        differences = [
            f"{name} {found.get(name)!r} instead of {self.identity.get(name)!r}"
            for name in sorted({*found, *self.identity})
            if found.get(name) != self.identity.get(name)
        ]
        if differences:
            raise TrainingError(
                f"{what}: expected the inputs, versions and dtype of this run, got "
                f"{'; '.join(differences)}. Restore these, or remove that file to start again."
            )


class Metrics:
    """The JSON lines of a run, and its progress.

    The file is rewritten whole at every checkpoint; resuming cuts it back to the checkpoint.
    """

    def __init__(
        self,
        path: Path,
        *,
        steps: int,
        first_step: int,
        initial_loss: float | None,
        describe: Callable[[int], Mapping[str, float | int]],
        step_tokens: int | None,
        progress: Progress | None,
    ) -> None:
        """Begin the lines, or read those up to the checkpoint.

        Args:
            path: The file.
            steps: Optimiser steps in all.
            first_step: Steps done before this process began.
            initial_loss: Validation loss before the first step, nats per token; None where
                nothing is validated.
            describe: What a line says of a number of steps done, beside losses and seconds.
            step_tokens: Tokens of a step, whose rate the progress tells; None tells none.
            progress: Told the step with loss and eta_seconds, and what else is known.
        """
        self._path = path
        self._steps = steps
        self._first_step = first_step
        self._describe = describe
        self._step_tokens = step_tokens
        self._progress = progress
        self._validation_loss = initial_loss
        self._rows: list[dict[str, float | int | None]] = []
        self._before = 0.0
        self._started = time.perf_counter()
        if first_step and path.exists():
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            self._rows.extend(line for line in lines if line["step"] <= first_step)
            if self._rows:
                self._before = self._rows[-1]["seconds"] or 0.0
                self._validation_loss = self._rows[-1].get("validation_loss")
        elif initial_loss is not None:
            self._append(0, None, initial_loss)

    @property
    def seconds(self) -> float:
        """Wall time of the run, restarts included."""
        return self._before + time.perf_counter() - self._started

    def _append(self, step: int, loss: float | None, validation_loss: float | None) -> None:
        row: dict[str, float | int | None] = {"step": step, "loss": loss}
        if self._validation_loss is not None:
            row["validation_loss"] = validation_loss
        seconds = round(self.seconds, 3)
        self._rows.append({**row, **self._describe(step), "seconds": seconds})

    def add(self, step: int, loss: float, validation_loss: float | None) -> None:
        """Add a line and tell the progress.

        Args:
            step: Optimiser steps done.
            loss: Mean training loss since the last line, nats per token.
            validation_loss: Loss of a validation made at this step, nats per token.
        """
        self._append(step, loss, validation_loss)
        if validation_loss is not None:
            self._validation_loss = validation_loss
        if self._progress is None:
            return
        seconds_per_step = (self.seconds - self._before) / (step - self._first_step)
        fields = {"loss": loss}
        if self._validation_loss is not None:
            fields["validation_loss"] = self._validation_loss
        if self._step_tokens is not None:
            fields["tokens_per_second"] = self._step_tokens / seconds_per_step
        eta = (self._steps - step) * seconds_per_step
        self._progress(step, self._steps, **fields, eta_seconds=eta)

    def save(self) -> None:
        """Write all lines.

        Raises:
            StorageError: On I/O errors.
        """
        lines = "".join(json.dumps(row) + "\n" for row in self._rows)
        write_bytes(self._path, lines.encode())
