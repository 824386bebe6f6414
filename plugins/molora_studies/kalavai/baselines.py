"""Models that a fusion is compared with and that are no adapters of its base.

Each task leaves `held_out.safetensors`: losses (N, T-1) in nats by domain, on the first held-out
blocks, where `plan_fusion` finds them as baselines.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save
from torch import nn

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.kinds import DeltaKind
from molora_fed.charter import AdapterRules, TrainingRules
from molora_fed.corpus.batches import mix_domains
from molora_fed.corpus.prepare import Corpus
from molora_fed.errors import ConfigError
from molora_fed.models.base import Base
from molora_fed.models.forward import compute_block_losses
from molora_fed.models.runtime import Placement, limit_threads
from molora_fed.plugins import get_plugins
from molora_fed.storage.files import write_bytes
from molora_fed.training.language_model import TrainConfig, TrainResult, train
from molora_fed.training.loop import CHECKPOINT_NAME
from molora_fed.training.pooled import continue_base
from molora_fed.types import Split
from molora_studies.framework.actions import open_base, open_corpus
from molora_studies.framework.contract import Done, Task, TaskContext
from molora_studies.framework.fusions import HELD_OUT_FILE
from molora_studies.framework.substrate import BaseSettings, Member, SpecialistSettings, plan_pooled
from molora_studies.kalavai.joint import JointModel

__all__ = [
    "continue_whole",
    "count_parameters",
    "find_width",
    "measure_model",
    "plan_joint",
    "plan_whole",
    "plan_wider",
    "train_joint",
]

_ROUTER_RATE = 3e-3  # three times what routers take on a bank, for there are fewer steps
# Of a specialist's rate. On validation text, 120 steps at D = 128 gained 0.0013 nats with 0.1; with
# 0.3 they never came back to where they started from.
_JOINT_SHARE = 0.1
_VALIDATIONS = 6
_WATCHED = 64  # validation blocks of all domains together, as for specialists


def count_parameters(settings: BaseSettings) -> int:
    """Parameters of a built-in base (GPT-NeoX, untied head)."""
    per_layer = 12 * settings.hidden**2 + 13 * settings.hidden
    ends = 2 * settings.vocab_size * settings.hidden + 2 * settings.hidden
    return settings.layers * per_layer + ends


def find_width(settings: BaseSettings, specialists: int) -> int:
    """The width at which a base has as many parameters as a base and its specialists together.

    A specialist counts with the weights and biases of its linear layers; embedding and head are
    shared.

    Args:
        settings: The narrow base.
        specialists: Number of fully trained specialists.

    Returns:
        The nearest hidden size whose heads have an even width, as rotary positions need.
    """
    own = settings.layers * (12 * settings.hidden**2 + 9 * settings.hidden)
    wanted = count_parameters(settings) + specialists * own
    unit = 2 * settings.heads
    least = max(1, settings.hidden // unit)
    most = least + math.isqrt(wanted // settings.layers) // unit + 1
    sizes = [unit * n for n in range(least, most)]

    def distance(hidden: int) -> int:
        return abs(count_parameters(settings.model_copy(update={"hidden": hidden})) - wanted)

    return min(sizes, key=distance)


def plan_wider(
    base: Task, wide: Task, corpora: Sequence[Task], *, steps: int, seed: int, held_out: int
) -> Task:
    """A wider base, trained on the pooled domains like the monolithic model.

    Args:
        base: The narrow base, whose tokenizer the wide one must have.
        wide: The wide base.
        corpora: Corpora of the narrow base.
        steps: Steps on the pooled domains.
        seed: Of data order.
        held_out: Held-out blocks of each domain.
    """
    pooled = plan_pooled(wide, corpora, SpecialistSettings(steps=steps, seed=seed))
    return Task(
        name=f"wider D={wide.settings['hidden']} {steps} steps seed={seed}",
        action="measure-model",
        settings={"held_out": held_out},
        needs=(base, wide, pooled, *corpora),
        seconds=10 + 4.0 * len(corpora),
    )


def plan_whole(
    base: Task,
    corpora: Sequence[Task],
    *,
    steps: int,
    seed: int,
    held_out: int,
    batch: int = 4,
    **recipe: float | int,
) -> Task:
    """The base continued on the pooled domains with all its parameters, embedding and head too.

    Args:
        base: The base.
        corpora: Its corpora.
        steps: Optimiser steps.
        seed: Of data order.
        held_out: Held-out blocks of each domain.
        batch: Blocks per step.
        **recipe: `learning_rate` and `validation` as in `SpecialistSettings`, where not usual.
    """
    one = plan_pooled(base, corpora, SpecialistSettings(steps=steps, seed=seed, batch=batch))
    return Task(
        name=f"{base.name} continued whole {steps} steps seed={seed}",
        action="continue-whole",
        settings={"steps": steps, "batch": batch, "seed": seed, "held_out": held_out, **recipe},
        needs=(base, *corpora),
        seconds=one.seconds,
    )


def plan_joint(
    base: Task, members: Sequence[Member], *, steps: int, seed: int, held_out: int, batch: int = 4
) -> Task:
    """Specialists and a router trained further together on the pooled train text.

    It starts from the fusion with the zero-training evidence router; see `JointModel`.

    Args:
        base: The shared base, expert 0, which stays as it is.
        members: The contributors, at most one for each corpus.
        steps: Optimiser steps; each runs every expert.
        seed: Of data order.
        held_out: Held-out blocks of each domain.
        batch: Blocks per step.
    """
    corpora = [member.corpus for member in members]
    one = plan_pooled(base, corpora, SpecialistSettings(steps=steps, seed=seed, batch=batch))
    return Task(
        name=f"joint of {len(members)}, {steps} steps seed={seed}",
        action="train-joint",
        settings={
            "steps": steps,
            "batch": batch,
            "seed": seed,
            "held_out": held_out,
            "members": [member.name for member in members],
        },
        needs=(base, *(member.adapter for member in members), *corpora),
        seconds=one.seconds * (len(members) + 0.5),
    )


def measure_model(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Measure a wide base with its adapter on the narrow base's held-out blocks.

    Raises:
        ConfigError: If the two bases read text as different tokens.
    """
    base, wide = open_base(context.needs[0]), open_base(context.needs[1])
    trained, corpora = context.needs[2], _open_corpora(context.needs[3:])
    if wide.tokenizer_fingerprint != base.tokenizer_fingerprint:
        raise ConfigError(
            f"Cannot compare with base '{wide.id}': expected tokenizer "
            f"{base.tokenizer_fingerprint[:16]}, got {wide.tokenizer_fingerprint[:16]}. "
            "Make both bases from the same domains and vocabulary size."
        )
    adapter = load_adapter(trained.folder / "adapter", plugins=get_plugins(), name="wider")
    with applied(wide.model, adapter) as model:
        losses = _measure(model, corpora, settings["held_out"], context)
    return {
        "parameters": sum(parameter.numel() for parameter in wide.model.parameters()),
        "hidden_size": wide.hidden_size,
        "steps": trained.result["steps"],
        "losses": losses,
    }


def continue_whole(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Train all parameters of the base on the pooled domains; see `plan_whole`."""
    base, corpora = open_base(context.needs[0]), _open_corpora(context.needs[1:])
    steps, count = settings["steps"], settings.get("validation")
    validation = [corpus.blocks[Split.VALIDATION] for corpus in corpora]
    continued = continue_base(
        base,
        [corpus.blocks[Split.TRAIN] for corpus in corpora],
        [blocks if count is None else blocks.take(count) for blocks in validation],
        steps=steps,
        training=TrainingRules(
            steps=steps,
            batch=settings["batch"],
            learning_rate=settings.get("learning_rate"),
            validate_every=max(1, -(-steps // _VALIDATIONS)),
        ),
        seed=settings["seed"],
        threads=context.threads,
        folder=context.folder / "continued",
        progress=context.progress,
    )
    model = continued.load(Placement.of(base.model)).model
    losses = _measure(model, corpora, settings["held_out"], context)
    shutil.rmtree(continued.folder)
    kept = ("steps", "tokens", "best_step", "initial_loss")
    return {
        **{name: continued.record[name] for name in kept},
        "loss": continued.record["watched_loss"],
        "losses": losses,
    }


def train_joint(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Train experts and router together; see `plan_joint`.

    Source: the mixture step of Branch-Train-MiX, arXiv 2403.07816, with whole models as experts
    and a router that reads evidence, too.
    """
    members = list(settings["members"])
    base, adapters = open_base(context.needs[0]), context.needs[1 : 1 + len(members)]
    corpora = _open_corpora(context.needs[1 + len(members) :])
    rate = _JOINT_SHARE * DeltaKind().suggest_learning_rate(base.hidden_size)
    model = JointModel(
        base.model,
        [_build_expert(base, done, name) for done, name in zip(adapters, members, strict=True)],
        end_of_text=base.tokenizer.eos_token_id,
        router_scale=_ROUTER_RATE / rate,
    )
    result = _train(model, model.trained_parameters(), rate, corpora, settings, context)
    losses = _measure(model, corpora, settings["held_out"], context)
    (context.folder / CHECKPOINT_NAME).unlink(missing_ok=True)
    return {**_describe(result), "expert_steps": result.steps * len(members), "losses": losses}


def _open_corpora(needs: Sequence[Done]) -> list[Corpus]:
    """Each corpus once, in the order given."""
    distinct = {done.task.key: done for done in needs}
    return [open_corpus(done) for done in distinct.values()]


def _build_expert(base: Base, done: Done, name: str) -> Any:
    """The specialist as a model of its own, free in the layers that its adapter may change."""
    adapter = load_adapter(done.folder / "adapter", plugins=get_plugins(), name=name)
    rules = AdapterRules(
        kinds=(DeltaKind.name,), max_bytes=2**62, frozen_depth=adapter.frozen_depth
    )
    with applied(base.model, adapter) as model:
        expert, _ = DeltaKind().prepare(model, rules, 1)
    return expert


def _train(
    model: Any,
    parameters: Sequence[nn.Parameter],
    learning_rate: float,
    corpora: Sequence[Corpus],
    settings: Mapping[str, Any],
    context: TaskContext,
) -> TrainResult:
    """The usual loop on pooled text: equal shares of the domains, best weights by validation."""
    steps, batch, seed = settings["steps"], settings["batch"], settings["seed"]
    rows = mix_domains([c.blocks[Split.TRAIN].tokens for c in corpora], steps * batch, seed=seed)
    config = TrainConfig(
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        seed=seed,
        threads=context.threads,
        validate_every=max(1, -(-steps // _VALIDATIONS)),
    )
    needs = "+".join(done.task.key for done in context.needs)
    return train(
        model,
        parameters,
        rows,
        _pool_validation(corpora),
        config,
        context.folder,
        context={"needs": needs},
        progress=context.progress,
    )


def _pool_validation(corpora: Sequence[Corpus]) -> NDArray[np.int32]:
    validation = [corpus.blocks[Split.VALIDATION] for corpus in corpora]
    share = max(1, min(_WATCHED // len(corpora), *(len(blocks) for blocks in validation)))
    return np.concatenate([blocks.take(share).tokens for blocks in validation])


def _describe(result: TrainResult) -> dict[str, Any]:
    kept = ("steps", "tokens", "best_step", "initial_loss", "loss")
    record = result.to_record()
    return {name: record[name] for name in kept}


def _measure(
    model: Any, corpora: Sequence[Corpus], count: int, context: TaskContext
) -> dict[str, float]:
    """Write losses of the first held-out blocks of each domain; returns their means."""
    with limit_threads(context.threads):
        losses = {
            corpus.blocks[Split.HELD_OUT].domain: compute_block_losses(
                model, corpus.blocks[Split.HELD_OUT].take(count).tokens
            ).contiguous()
            for corpus in corpora
        }
    write_bytes(context.folder / HELD_OUT_FILE, save(losses))
    return {domain: float(nll.double().mean()) for domain, nll in losses.items()}
