"""What a training run needs to go on after a kill: one safetensors file, replaced whole.

The file holds the trained parameters, AdamW's moments, the best parameters so far, and as metadata
the step reached and the run's identity: everything that decides the bytes of the result.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from molora_fed.errors import TrainingError
from molora_fed.storage.files import write_bytes
from molora_fed.types import Progress

__all__ = [
    "CheckpointStore",
    "Counters",
    "Metrics",
    "Tensors",
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
            StorageError: If the disk refuses; the former checkpoint stays.
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
        counters: Counters,
        steps: int,
        step_tokens: int,
        progress: Progress | None,
    ) -> None:
        self._path = path
        self._steps = steps
        self._step_tokens = step_tokens
        self._progress = progress
        self._first_step = counters.step
        self._validation_loss = counters.initial_loss
        self._rows: list[dict[str, float | int | None]] = []
        self._before = 0.0
        self._started = time.perf_counter()
        if counters.step and path.exists():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            kept = [line for line in lines if line["step"] <= counters.step]
            self._rows.extend(kept)
            self._before = kept[-1]["seconds"]
            self._validation_loss = kept[-1]["validation_loss"]
        else:
            self._append(0, None, counters.initial_loss, 0.0)

    @property
    def seconds(self) -> float:
        """Wall time of the run, restarts included."""
        return self._before + time.perf_counter() - self._started

    def _append(
        self, step: int, loss: float | None, validation_loss: float | None, rate: float
    ) -> None:
        self._rows.append(
            {
                "step": step,
                "loss": loss,
                "validation_loss": validation_loss,
                "learning_rate": rate,
                "tokens": step * self._step_tokens,
                "seconds": round(self.seconds, 3),
            }
        )

    def add(self, step: int, loss: float, validation_loss: float | None, rate: float) -> None:
        """Add a line and tell the progress.

        Args:
            step: Optimiser steps done.
            loss: Mean training loss since the last line, nats per token.
            validation_loss: Loss of a validation made at this step, nats per token.
            rate: Learning rate of the step.
        """
        self._append(step, loss, validation_loss, rate)
        if validation_loss is not None:
            self._validation_loss = validation_loss
        if self._progress is not None:
            seconds_per_step = (self.seconds - self._before) / (step - self._first_step)
            self._progress(
                step,
                self._steps,
                loss=loss,
                validation_loss=self._validation_loss,
                tokens_per_second=self._step_tokens / seconds_per_step,
                eta_seconds=(self._steps - step) * seconds_per_step,
            )

    def save(self) -> None:
        """Write all lines.

        Raises:
            StorageError: If the disk refuses.
        """
        lines = "".join(json.dumps(row) + "\n" for row in self._rows)
        write_bytes(self._path, lines.encode())
