"""Adaptation: a population's adapters and router trained together, through the frozen base.

- Every step sees equally many blocks of every domain; their order follows from (seed, step) alone,
  so a run that is killed at any moment and started again ends with the same bytes.
- Nothing is chosen by validation: all branches and cells that are compared take equal steps, and
  what they end with is the result.
- Gates come from the base's states on disk, so the base runs once per step, with all slots in it.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from molora_fed.bank.states import BaseStates, StateBatch, take_balanced
from molora_fed.bank.views import GateView
from molora_fed.errors import PopulationError, TrainingError
from molora_fed.models.base import Base
from molora_fed.models.forward import evaluating
from molora_fed.models.runtime import describe_environment, deterministic, limit_threads
from molora_fed.population.adaptation_config import AdaptationConfig, AdaptationLog
from molora_fed.population.contract import AdapterRouter, Population
from molora_fed.population.mixture import Mixture
from molora_fed.storage.files import hash_bytes
from molora_fed.storage.locks import lock_folder
from molora_fed.training.checkpoints import CheckpointStore, Counters
from molora_fed.training.optimizer import read_tensors, write_tensors
from molora_fed.types import Progress

__all__ = ["AdaptationConfig", "Factor", "Trained", "adapt", "compute_loss"]

Factor = Literal["a", "b"]
"""One factor of every slot's product B A."""
Trained = Literal["both", "a", "b"]
"""Which factors of the slots are trained; the router is trained beside any of them."""

CHECKPOINT_NAME = "adaptation.safetensors"
METRICS_NAME = "adaptation.jsonl"
REPORT_EVERY = 5  # steps between two readings of the loss: a reading waits for the device


def compute_loss(
    model: Any, mixture: Mixture, router: Callable[[GateView], Tensor], batch: StateBatch
) -> Tensor:
    """Mean loss of a population over a batch's B * (T - 1) predicted tokens, nats.

    Differentiable in the mixture's factors and the router's parameters.

    Args:
        model: The base's model, which the mixture was built on.
        mixture: The slots.
        router: Gates of the slots.
        batch: Tokens (B, T) and the states the router reads.
    """
    gates = router(batch.view)[:, :-1]
    with mixture.mixed(gates):
        logits = model(input_ids=batch.tokens[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.tokens[:, 1:].flatten())


class _Run:
    """Mixture, router and optimiser of one adaptation."""

    def __init__(
        self,
        base: Base,
        population: Population,
        router: AdapterRouter,
        config: AdaptationConfig,
        trained_factors: Trained,
    ) -> None:
        self.model = base.model
        self.config = config
        self.device = next(base.model.parameters()).device
        self.mixture = Mixture(base.model, population).to(self.device)
        self.router = copy.deepcopy(router).to(self.device)
        if trained_factors != "both":
            for layer in self.mixture.layers:
                for name, parameter in layer.named_parameters():
                    parameter.requires_grad_(name == trained_factors)
        parts = [
            (config.learning_rate, self.mixture),
            (config.router_learning_rate, self.router),
        ]
        self.groups: list[list[nn.Parameter]] = []
        self.rates: list[float] = []
        for rate, module in parts:
            trained = [p for p in module.parameters() if p.requires_grad]
            if rate == 0:
                module.requires_grad_(False)
            elif trained:
                self.groups.append(trained)
                self.rates.append(rate)
        if not self.groups:
            raise TrainingError(
                "Cannot adapt: expected adapters or a router to train, got neither. Set a "
                "learning rate above 0."
            )
        self.parameters = [p for group in self.groups for p in group]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": group, "lr": rate}
                for group, rate in zip(self.groups, self.rates, strict=True)
            ],
            betas=(0.9, 0.99),
            weight_decay=0.0,
            fused=True,
        )

    def step(self, index: int, batch: StateBatch) -> Tensor:
        """One step of this adaptation, from 0; returns the loss before it."""
        config = self.config
        self.router.set_progress(min(1.0, (config.first_step + index) / config.whole))
        loss = compute_loss(self.model, self.mixture, self.router, batch)
        loss.backward()
        for group in self.groups:
            for parameter in group:
                if parameter.grad is None:  # took no part in this batch
                    parameter.grad = torch.zeros_like(parameter)
            nn.utils.clip_grad_norm_(group, config.clip_norm)
        scale = config.scale_rate(index)
        for settings, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            settings["lr"] = rate * scale
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def finish(self, population: Population) -> tuple[Population, AdapterRouter]:
        """The slots and the router as they are now."""
        config = self.config
        done = min(1.0, (config.first_step + config.steps) / config.whole)
        self.router.set_progress(done)
        self.router.requires_grad_(True)
        return self.mixture.read_slots(population), self.router.cpu().eval()


def adapt(
    base: Base,
    population: Population,
    router: AdapterRouter,
    states: Sequence[BaseStates],
    config: AdaptationConfig,
    folder: Path,
    *,
    trained_factors: Trained = "both",
    progress: Progress | None = None,
) -> tuple[Population, AdapterRouter]:
    """Train a population, or go on where a killed run in the same folder stopped.

    Args:
        base: The base; its model runs where it lies, and stays as it is.
        population: Where the slots start; it stays as it is.
        router: Where the router starts; it stays as it is.
        states: The base over each domain's training blocks, with what the router reads.
        config: Settings.
        folder: Gets `adaptation.safetensors` and `adaptation.jsonl`; a finished run is read back.
        trained_factors: Which factors of the slots are trained; the others stay as they are.
        progress: Told the step with loss and eta_seconds.

    Returns:
        The population and the router after the last step, on the CPU.

    Raises:
        PopulationError: If the slots do not fit the base, the router is for another number, or
            the batch cannot be shared by the domains.
        TrainingError: If settings cannot be trained with, the loss is not finite, another process
            trains in the folder, or its checkpoint was made from other inputs, versions,
            hardware or dtype.
        StorageError: If the disk refuses.
    """
    if router.num_slots != population.num_slots:
        raise PopulationError(
            f"Cannot adapt a population: expected a router of {population.num_slots} slots, got "
            f"{router.num_slots}. Build the router for this population."
        )
    config.check(states)
    run = _Run(base, population, router, config, trained_factors)
    identity = _identify(base, population, run, states)
    if trained_factors != "both":
        identity["trained_factors"] = trained_factors
    with lock_folder(folder):
        store = CheckpointStore(folder / CHECKPOINT_NAME, identity)
        found = store.load(run.parameters)
        start, threads = (0, config.threads) if found is None else (found[0].step, found[0].threads)
        if found is not None:
            write_tensors(run.parameters, run.optimizer, start, found[1])
        devices = [run.device] if run.device.type == "cuda" else []
        with (
            limit_threads(threads),
            deterministic(run.device),
            torch.random.fork_rng(devices=devices),
            evaluating(run.model),
        ):
            _loop(
                run,
                states,
                start,
                threads,
                AdaptationLog(folder / METRICS_NAME, start),
                store,
                progress,
            )
        return run.finish(population)


def _loop(
    run: _Run,
    states: Sequence[BaseStates],
    start: int,
    threads: int,
    log: AdaptationLog,
    store: CheckpointStore,
    progress: Progress | None,
) -> None:
    """Take the steps from `start` to the end."""
    config = run.config
    pending: list[Tensor] = []  # losses not read yet
    run.router.train()
    for index in range(start, config.steps):
        place = config.first_step + index
        torch.manual_seed(int(np.random.SeedSequence([config.seed, place]).generate_state(1)[0]))
        batch = take_balanced(
            states, place, batch=config.batch, seed=config.seed, device=run.device
        )
        pending.append(run.step(index, batch))
        step = index + 1
        is_due = step % config.checkpoint_every == 0 or step == config.steps
        if is_due or step % REPORT_EVERY == 0:
            loss = float(torch.stack(pending).mean())
            pending.clear()
            _check_finite(loss, place + 1)
            log.add(step, loss, config.scale_rate(index))
            if progress is not None:
                eta = log.seconds / (step - start) * (config.steps - step)
                progress(step, config.steps, loss=loss, eta_seconds=eta)
            if is_due:
                log.save()
                tensors = read_tensors(run.parameters, run.optimizer)
                store.save(Counters(step, loss, step, loss, 0, False, threads), tensors)


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"Cannot adapt a population: expected a finite loss up to step {step}, got {loss}. "
            "Lower the learning rates, or check the slots."
        )


def _identify(
    base: Base, population: Population, run: _Run, states: Sequence[BaseStates]
) -> dict[str, Any]:
    """Everything that decides the bytes of the result, except threads."""
    modules = (run.mixture, run.router)
    values = [tensor for module in modules for tensor in module.state_dict().values()]
    start = b"".join(v.detach().cpu().contiguous().numpy().tobytes() for v in values)
    settings = asdict(run.config)
    for name in ("threads", "checkpoint_every"):  # neither changes the result
        del settings[name]
    router = run.router
    return {
        **describe_environment(run.device.type),
        **settings,
        "base": base.weights,
        "dtype": str(run.model.dtype).removeprefix("torch."),
        "router": f"{type(router).__module__}:{type(router).__qualname__}",
        "router_options": router.options.model_dump(mode="json"),
        "slots": [slot.birth.id for slot in population.slots],
        "start": hash_bytes(start),
        "blocks": [state.blocks.fingerprint for state in states],
    }
