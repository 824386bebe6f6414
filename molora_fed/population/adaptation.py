"""Adaptation: a population's adapters and router trained together, through the frozen base.

- Every step sees equally many blocks of every domain; their order follows from (seed, step) alone,
  so a run that is killed at any moment and started again ends with the same bytes.
- Nothing is chosen by validation: all branches and cells that are compared take equal steps, and
  what they end with is the result.
- Gates come from the base's states on disk, so the base runs once per step, with all slots in it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from molora_fed.bank.states import BaseStates, StateBatch, take_balanced
from molora_fed.bank.views import GateView
from molora_fed.errors import PopulationError, TrainingError
from molora_fed.models.base import Base
from molora_fed.models.runtime import describe_environment
from molora_fed.models.states import evaluating
from molora_fed.population.adaptation_config import AdaptationConfig
from molora_fed.population.contract import AdapterRouter, Population
from molora_fed.population.mixture import Mixture
from molora_fed.storage.files import hash_bytes
from molora_fed.training.loop import TrainingJob, run_training, seed_step
from molora_fed.types import Progress

__all__ = ["AdaptationConfig", "Factor", "Trained", "adapt", "compute_loss"]

Factor = Literal["a", "b"]
"""One factor of every slot's product B A."""
Trained = Literal["both", "a", "b"]
"""Which factors of the slots are trained; the router is trained beside any of them."""

CHECKPOINT_NAME = "adaptation.safetensors"
METRICS_NAME = "adaptation.jsonl"


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
    compute = router.compute_gates if isinstance(router, AdapterRouter) else router
    gates = compute(batch.view)[:, :-1]
    with mixture.mixed(gates):
        logits = model(input_ids=batch.tokens[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.tokens[:, 1:].flatten())


class _Parts:
    """Copies of slots and router to train, with their parameters and rates."""

    def __init__(
        self,
        base: Base,
        population: Population,
        router: AdapterRouter,
        config: AdaptationConfig,
        trained_factors: Trained,
    ) -> None:
        device = next(base.model.parameters()).device
        self.mixture = Mixture(base.model, population).to(device)
        self.router = copy.deepcopy(router).to(device)
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

    def build_optimizer(self) -> torch.optim.AdamW:
        """AdamW with a rate for each group, without decay."""
        groups = [
            {"params": group, "lr": rate}
            for group, rate in zip(self.groups, self.rates, strict=True)
        ]
        return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)


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
    """Train a population, or resume a run that was stopped in the same folder.

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
        StorageError: On I/O errors.
    """
    if router.num_slots != population.num_slots:
        raise PopulationError(
            f"Cannot adapt a population: expected a router of {population.num_slots} slots, got "
            f"{router.num_slots}. Build the router for this population."
        )
    config.check(states)
    parts = _Parts(base, population, router, config, trained_factors)
    model, device = base.model, next(base.model.parameters()).device

    def loss(step: int) -> Iterator[Tensor]:
        place = config.first_step + step
        seed_step(config.seed, place)
        batch = take_balanced(states, place, batch=config.batch, seed=config.seed, device=device)
        parts.router.set_progress(min(1.0, place / config.whole))
        yield compute_loss(model, parts.mixture, parts.router, batch)

    identity = _identify(base, population, parts, config, states)
    if trained_factors != "both":
        identity["trained_factors"] = trained_factors
    job = TrainingJob(
        parameters=parts.groups,
        optimizer=parts.build_optimizer(),
        rates=lambda step: [rate * config.scale_rate(step) for rate in parts.rates],
        loss=loss,
        validate=None,
        steps=config.steps,
        save_every=config.checkpoint_every,
        identity=identity,
        describe=lambda step: {"rate_scale": config.scale_rate(step - 1)},
        threads=config.threads,
        clip_norm=config.clip_norm,
        first_step=config.first_step,
        failure="Cannot adapt a population",
        advice="Lower the learning rates, or check the slots.",
        checkpoint_name=CHECKPOINT_NAME,
        metrics_name=METRICS_NAME,
    )
    parts.router.train()
    with evaluating(model):
        run_training(job, folder, progress)
    parts.router.set_progress(min(1.0, (config.first_step + config.steps) / config.whole))
    parts.router.requires_grad_(True)
    return parts.mixture.read_slots(population), parts.router.cpu().eval()


def _identify(
    base: Base,
    population: Population,
    parts: _Parts,
    config: AdaptationConfig,
    states: Sequence[BaseStates],
) -> dict[str, Any]:
    """Everything that decides the bytes of the result, except threads."""
    modules = (parts.mixture, parts.router)
    values = [tensor for module in modules for tensor in module.state_dict().values()]
    start = b"".join(v.detach().cpu().contiguous().numpy().tobytes() for v in values)
    settings = asdict(config)
    for name in ("threads", "checkpoint_every"):  # neither changes the result
        del settings[name]
    router = parts.router
    return {
        **describe_environment(base.model.device.type),
        **settings,
        "base": base.weights,
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "router": f"{type(router).__module__}:{type(router).__qualname__}",
        "router_options": router.options.model_dump(mode="json"),
        "slots": [slot.birth.id for slot in population.slots],
        "start": hash_bytes(start),
        "blocks": [state.blocks.fingerprint for state in states],
    }
