"""Controls: what pooling everybody's text would have given, where one machine holds all of it.

A cooperative's folder may hold `control/`, which only a machine with everybody's text can fill (the
demo's does). Whoever fuses there reports the controls beside the fused model.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from molora_fed.adapters.contract import open_kind
from molora_fed.adapters.files import load_adapter
from molora_fed.charter import Charter
from molora_fed.corpus.prepare import Corpus
from molora_fed.errors import DivergedError, TrainingError
from molora_fed.fusion.texts import Control
from molora_fed.models.base import Base
from molora_fed.plugins import Plugins
from molora_fed.storage.files import write_json
from molora_fed.training.adapter_job import Specialist, load_specialist
from molora_fed.training.pooled import (
    CONTROL_KIND,
    ContinuedBase,
    choose_rate,
    continue_base,
    load_continued,
    train_monolithic,
)
from molora_fed.types import Progress, Split

__all__ = ["CONTROLS", "ControlName", "PooledTraining", "find_control_adapter", "load_controls"]

ControlName = Literal["monolithic", "base_continued"]
"""`monolithic`: one adapter of the linear layers; `base_continued`: all parameters. These are
also the names of their rows in reports."""

CONTROLS: tuple[ControlName, ...] = ("monolithic", "base_continued")
_FOLDER = "control"
_RATES = "rates.json"


@dataclass(frozen=True, eq=False)
class PooledTraining:
    """Everything that both controls are trained from.

    Attributes:
        folder: The cooperative's folder; gets `control/NAME/` for each.
        charter: Its charter; batch, validations and seed count.
        base: Its base.
        corpora: Everybody's text.
        contributors: How many trained alone: the controls take the steps that all of them may take
            together. Those who stop early take fewer, which never favours the fused model.
        threads: Torch threads.
        plugins: Where adapter kinds are registered.
    """

    folder: Path
    charter: Charter
    base: Base
    corpora: Sequence[Corpus]
    contributors: int
    threads: int
    plugins: Plugins

    @property
    def steps(self) -> int:
        """Optimiser steps of one control."""
        return self.charter.amendment.training.steps * self.contributors

    def train(self, name: ControlName, progress: Progress | None = None) -> None:
        """Train a control at several learning rates, and keep the one best on validation text.

        Tried are half, once and twice the rate of a specialist, and further down or up while the
        best lies at an end. Every try takes all steps: a fifth of them preferred rates that are
        worse in the end (docs/decisions/005). Stopped and called again it goes on.

        Args:
            name: Which control.
            progress: Told the step with loss, validation_loss, tokens_per_second and eta_seconds.

        Raises:
            TrainingError: If the folder holds another training, or no rate gives a finite loss.
            StorageError: On I/O errors.
        """
        folder = self.folder / _FOLDER / name

        def attempt(rate: float) -> float:
            try:
                return self._run(name, _find_try(folder, rate), rate, progress).loss
            except DivergedError:
                return math.inf

        rate, losses = choose_rate(self._find_start(), attempt)
        table = {f"{each:g}": losses[each] for each in sorted(losses)}
        write_json(folder / _RATES, {"chosen": rate, "validation_loss": table})
        for other in losses.keys() - {rate}:
            shutil.rmtree(_find_try(folder, other) / "base", ignore_errors=True)

    def _find_start(self) -> float:
        """The rate of a specialist that trains all of its linear layers."""
        given = self.charter.amendment.training.learning_rate
        if given is not None:
            return given
        kind = open_kind(CONTROL_KIND, None, self.plugins)
        return kind.suggest_learning_rate(self.base.hidden_size)

    def _run(
        self,
        name: ControlName,
        folder: Path,
        rate: float,
        progress: Progress | None,
    ) -> Specialist | ContinuedBase:
        identity, amendment = self.charter.identity, self.charter.amendment
        train: Callable[..., Specialist | ContinuedBase] = continue_base
        if name == "monolithic":
            train = partial(train_monolithic, rules=identity.adapters)
        return train(
            self.base,
            [corpus.blocks[Split.TRAIN] for corpus in self.corpora],
            [corpus.blocks[Split.VALIDATION] for corpus in self.corpora],
            steps=self.steps,
            training=amendment.training.model_copy(update={"learning_rate": rate}),
            seed=amendment.seed,
            threads=self.threads,
            folder=folder,
            plugins=self.plugins,
            evaluation_batch=identity.corpus.evaluation_batch,
            progress=progress,
        )


def _find_try(folder: Path, rate: float) -> Path:
    return folder / f"{rate:g}"


def _find_chosen(folder: Path) -> Path | None:
    """Folder of the try that was chosen; None before all are done.

    Raises:
        TrainingError: If what says so is malformed.
    """
    path = folder / _RATES
    if not path.exists():
        return None
    try:
        return _find_try(folder, float(json.loads(path.read_text(encoding="utf-8"))["chosen"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"Cannot read the control in '{folder}': expected the chosen learning rate in "
            f"'{_RATES}', got {type(error).__name__}: {error}. Remove the folder."
        ) from error


def find_control_adapter(folder: Path) -> Path | None:
    """The adapter of `monolithic` in a cooperative's folder, if there is one.

    Raises:
        TrainingError: If the control is malformed.
    """
    chosen = _find_chosen(folder / _FOLDER / "monolithic")
    return None if chosen is None else chosen / "adapter"


def load_controls(folder: Path, plugins: Plugins) -> dict[str, Control]:
    """The finished controls in a cooperative's folder, by name; empty where it holds none.

    Args:
        folder: The cooperative's folder.
        plugins: Where adapter kinds are registered.

    Raises:
        TrainingError: If a record is malformed.
        AdapterError: If an adapter is malformed.
        BaseCheckpointError: If a checkpoint is.
    """
    found: dict[str, Control] = {}
    for name in CONTROLS:
        trained = _find_chosen(folder / _FOLDER / name)
        if trained is None:
            continue
        if name == "base_continued":
            continued = load_continued(trained)
            found[name] = Control(continued.load(), continued.record)
        else:
            one = load_specialist(trained)
            adapter = load_adapter(one.adapter_folder, plugins=plugins, name=name)
            found[name] = Control(adapter, one.record)
    return found
