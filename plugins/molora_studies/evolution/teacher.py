"""A synthetic teacher whose adapters are aligned with its tasks as much as one says.

Inputs come in K contexts. In context k the teacher adds `U_k V_k x` to what the base says, of
rank R; adapter k adds `rho U_k V_k x + sqrt(1 - rho^2) U'_k V_k x` to it, where all the columns of
U and U' are orthonormal. So rho is the cosine between an adapter and its task, all adapters have
one size, and adapters of other tasks do harm. With the base's loss as 1, gates that know the
context reach 1 - rho^2: gate rho for the context's own adapter, 0 for the others.

A router does not see the context but a noisy cue of it. Source: own definition; the abstract of
arXiv 2605.11153 names a sandbox with controllable alignment.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Channel",
    "Sample",
    "Teacher",
    "build_objective",
    "compute_gates",
    "count_parameters",
    "measure_loss",
]

Channel = Literal["soft", "hard"]
"""Gates sigmoid(s), or 1 where s > 0 and else 0 (with the sigmoid's gradient, straight through)."""

CONTEXTS = 4
RANK = 2
WIDTH = 2 * CONTEXTS * RANK
CUE_WIDTH = 8
CUE_NOISE = 0.3


@dataclass(frozen=True, eq=False)
class Sample:
    """Examples, in units in which the base's loss without noise is 1.

    Attributes:
        cues: What the router sees, (N, cue width).
        targets: What the base lacks, with label noise, (N, D).
        outputs: What each adapter adds, (N, P, D).
    """

    cues: Tensor
    targets: Tensor
    outputs: Tensor


class Teacher:
    """One draw of tasks and adapters.

    Args:
        alignment: rho in [0, 1].
        seed: Of the tasks.
    """

    def __init__(self, alignment: float, seed: int) -> None:
        random = np.random.default_rng([seed, 0])
        basis = np.linalg.qr(random.normal(size=(WIDTH, WIDTH)))[0]
        own = basis[:, : WIDTH // 2].reshape(WIDTH, CONTEXTS, RANK).transpose(1, 0, 2)
        strange = basis[:, WIDTH // 2 :].reshape(WIDTH, CONTEXTS, RANK).transpose(1, 0, 2)
        inward = random.normal(size=(CONTEXTS, RANK, WIDTH)) / (RANK * WIDTH) ** 0.5
        self.tasks = own @ inward  # (K, D, D)
        self.adapters = alignment * self.tasks + (1 - alignment**2) ** 0.5 * (strange @ inward)
        self.centres = np.linalg.qr(random.normal(size=(CUE_WIDTH, CONTEXTS)))[0].T  # (K, cue)
        self._seed = seed

    def draw(self, count: int, noise: float, stream: int) -> Sample:
        """Draw examples, a pure function of the teacher's seed and the stream.

        Args:
            count: N.
            noise: Standard deviation of the label noise over that of the teacher's signal.
            stream: Number of the data set.
        """
        random = np.random.default_rng([self._seed, 1, stream])
        context = random.integers(CONTEXTS, size=count)
        inputs = random.normal(size=(count, WIDTH))
        signal = np.einsum("nij,nj->ni", self.tasks[context], inputs)
        size = np.sqrt((self.tasks**2).sum(axis=(1, 2)).mean())  # root of the expected |signal|^2
        outputs = np.einsum("pij,nj->npi", self.adapters, inputs) / size
        labels = noise * random.normal(size=signal.shape) / WIDTH**0.5
        cues = self.centres[context] + CUE_NOISE * random.normal(size=(count, CUE_WIDTH))
        return Sample(*(_to_tensor(v) for v in (cues, signal / size + labels, outputs)))


def _to_tensor(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def count_parameters() -> int:
    """Length of a router's parameters: w and b of each adapter."""
    return CONTEXTS * (CUE_WIDTH + 1)


def compute_gates(parameters: Tensor, cues: Tensor, channel: Channel) -> Tensor:
    """Gates of every adapter, (N, P).

    Args:
        parameters: w and b of each adapter, (P * (cue width + 1),).
        cues: What the router sees, (N, cue width).
        channel: Form of the gates.
    """
    rows = parameters.view(CONTEXTS, CUE_WIDTH + 1)
    soft = torch.sigmoid(torch.addmm(rows[:, -1], cues, rows[:, :-1].T))
    if channel == "soft":
        return soft
    hard = (soft > 0.5).to(soft)
    return hard + soft - soft.detach() if soft.requires_grad else hard


def measure_loss(parameters: Tensor, sample: Sample, channel: Channel) -> Tensor:
    """Mean squared error in units of the base's without noise, a scalar."""
    gates = compute_gates(parameters, sample.cues, channel)
    errors = sample.targets - torch.bmm(gates.unsqueeze(1), sample.outputs).squeeze(1)
    return errors.square().sum(dim=1).mean()


def build_objective(
    sample: Sample, channel: Channel, batch: int, first: int = 0
) -> Callable[[Tensor, int], Tensor]:
    """The loss on an update's batch, for `molora_evolution.search`.

    Args:
        sample: Training examples; batches go through them in order, again and again.
        channel: Form of the gates.
        batch: Examples per batch.
        first: Number of the first update's batch.
    """
    parts = [
        Sample(*pieces)
        for pieces in zip(
            *(v.split(batch) for v in (sample.cues, sample.targets, sample.outputs)), strict=True
        )
    ]
    return lambda parameters, update: measure_loss(
        parameters, parts[(first + update) % len(parts)], channel
    )
