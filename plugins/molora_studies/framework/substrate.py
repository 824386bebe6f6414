"""What most studies are made of, as tasks: bases, corpora, specialists, and their fusion.

Nothing is computed here: these functions plan, `molora_studies.framework.actions` does the work.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from molora_fed.types import Mixture
from molora_studies.framework.contract import Task

__all__ = [
    "BaseSettings",
    "FusionSettings",
    "Member",
    "SpecialistSettings",
    "plan_base",
    "plan_base_text",
    "plan_continued_base",
    "plan_corpus",
    "plan_fusion",
    "plan_mean",
    "plan_pooled",
    "plan_specialist",
]

DEFAULT_DOMAINS = ("cpp", "python", "readme", "science")
_FETCH_SECONDS = 30.0
_FLOPS = 5e10  # a quiet core's float operations a second in training, for estimates only


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseSettings(_Settings):
    """The base of a study.

    Attributes:
        source: "builtin", a folder, or ID@REVISION; the fields below are the built-in base's.
        domains: Domains whose train splits it is trained on.
        hidden: D.
        layers: L.
        heads: Attention heads.
        vocab_size: Tokens of the vocabulary.
        steps: Optimiser steps.
        batch: Blocks per step.
        learning_rate: Peak of AdamW's rate.
        init_std: Standard deviation of initial weights.
        seed: Of weights and data order.
        block_size: T.
        threads: Torch threads, which decide the last bits; one is fastest where cores are busy.
        device: Where all that rests on it runs: "cpu", "cuda" or "cuda:N".
        dtype: Dtype of its weights and of matrix products in all that rests on it; losses and
            what is trained are float32 whatever it is.
    """

    source: str = "builtin"
    domains: tuple[str, ...] = DEFAULT_DOMAINS
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    vocab_size: int = 2048
    steps: int = 2600
    batch: int = 4
    learning_rate: float = 3e-3
    init_std: float = 0.06
    seed: int = 42
    block_size: int = 128
    # Left out where usual: keys of bases from before there was a choice do not know of it.
    threads: int = Field(default=2, ge=1, exclude_if=lambda threads: threads == 2)
    device: str = Field(default="cpu", exclude_if=lambda device: device == "cpu")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", exclude_if=lambda dtype: dtype == "float32"
    )


class SpecialistSettings(_Settings):
    """How a specialist of a study is trained.

    Attributes:
        kind: Adapter kind; `delta` is full fine-tuning of the linear layers.
        rank: R of low-rank kinds.
        steps: Optimiser steps.
        batch: Blocks per step.
        learning_rate: Peak of AdamW's rate; None takes the kind's default.
        frozen_depth: K.
        validate_every: Steps between validations; the best weights are kept.
        patience: Validations without improvement before stopping; None never stops early.
        seed: Of initial factors and data order.
        options: Options of the kind, e.g. {"targets": "attention"}.
        validation: Validation blocks of each domain that are looked at; None takes all.
    """

    kind: str = "delta"
    rank: int = 64
    steps: int = 600
    batch: int = 4
    learning_rate: float | None = None
    frozen_depth: int = 0
    validate_every: int = 100
    patience: int | None = None
    seed: int = 42
    # Left out where empty: keys of tasks without options do not know of them.
    options: Mapping[str, Any] = Field(default={}, exclude_if=lambda options: not options)
    validation: int | None = Field(default=None, ge=1, exclude_if=lambda count: count is None)


class FusionSettings(_Settings):
    """How specialists of a study are fused and measured.

    Attributes:
        routers: Options by label; the router's name is the option `router`, the label if absent;
            with `top_k`, its best k experts alone are mixed.
        merges: Registered merges measured beside.
        mixture: Probability or logit mixture.
        base_expert: Whether the base is expert 0.
        guarded: Whether routers that lose a domain are refitted; False takes the first fit.
        calibration: Calibration blocks of each domain.
        held_out: Held-out blocks of each domain.
        seed: Of routers and bootstrap.
    """

    routers: Mapping[str, Mapping[str, Any]] = Field(default={"evidence": {}})
    merges: tuple[str, ...] = ("average",)
    mixture: Mixture = "probability"
    base_expert: bool = True
    guarded: bool = True
    calibration: int = 150
    held_out: int = 160
    seed: int = 42


@dataclass(frozen=True, eq=False)
class Member:
    """One contributor of a fusion.

    Attributes:
        name: Unique name; the expert's.
        adapter: Task whose folder holds `adapter/`.
        corpus: Task of its domain's blocks.
    """

    name: str
    adapter: Task
    corpus: Task


def _estimate_training(settings: Mapping[str, Any], steps: int, batch: int) -> float:
    """Seconds on one quiet core."""
    hidden, layers = settings.get("hidden", 128), settings.get("layers", 4)
    numbers = 12 * layers * hidden**2 + 2 * settings.get("vocab_size", 2048) * hidden
    tokens = steps * batch * settings.get("block_size", 128)
    return 6.0 * numbers * tokens / _FLOPS + steps * 0.01 + 5.0


def plan_base(settings: BaseSettings | None = None) -> Task:
    """A base; the task's folder holds the checkpoint in `base/`."""
    chosen = settings or BaseSettings()
    values = chosen.model_dump(mode="json")
    name, seconds = f"base {chosen.source}", _FETCH_SECONDS
    if chosen.source == "builtin":
        name += f" D={chosen.hidden} steps={chosen.steps} seed={chosen.seed}"
        seconds = _estimate_training(values, chosen.steps, chosen.batch)
    return Task(name=name, action="make-base", settings=values, seconds=seconds)


def plan_continued_base(base: Task, corpora: Sequence[Task], *, steps: int, seed: int = 42) -> Task:
    """The base trained further on domains in equal shares; its folder holds `base/`, too.

    Only its linear layers move. The tokenizer stays, so corpora of the base serve both.
    """
    pooled = plan_pooled(base, corpora, SpecialistSettings(steps=steps, seed=seed))
    return Task(
        name=f"{base.name} continued {steps} steps seed={seed}",
        action="apply-to-base",
        settings={},
        needs=(base, pooled),
        seconds=5,
    )


def plan_corpus(base: Task, domain: str, *, shard: tuple[int, int] = (0, 1)) -> Task:
    """Blocks of a domain with the base's tokenizer, in `corpus/`; a shard of several if given."""
    return Task(
        name=f"corpus {domain}" + (f" {shard[0] + 1} of {shard[1]}" if shard[1] > 1 else ""),
        action="prepare-domain",
        settings={
            "domain": domain,
            "shard": list(shard),
            "block_size": base.settings.get("block_size", 128),
        },
        needs=(base,),
        seconds=15,
    )


def plan_specialist(base: Task, corpus: Task, settings: SpecialistSettings | None = None) -> Task:
    """A specialist of one domain; the folder holds `adapter/`, the result is its record."""
    chosen = settings or SpecialistSettings()
    return Task(
        name=f"{corpus.settings['domain']} {chosen.kind} {chosen.steps} steps seed={chosen.seed}",
        action="train-domain",
        settings=chosen.model_dump(mode="json"),
        needs=(base, corpus),
        seconds=_estimate_training(base.settings, chosen.steps, chosen.batch),
    )


def plan_pooled(base: Task, corpora: Sequence[Task], settings: SpecialistSettings) -> Task:
    """The base trained on several domains in equal shares: monolithic training, base continued."""
    names = "+".join(corpus.settings["domain"] for corpus in corpora)
    return Task(
        name=f"pooled {names} {settings.steps} steps seed={settings.seed}",
        action="train-pooled",
        settings=settings.model_dump(mode="json"),
        needs=(base, *corpora),
        seconds=_estimate_training(base.settings, settings.steps, settings.batch),
    )


def plan_fusion(
    name: str,
    base: Task,
    members: Sequence[Member],
    settings: FusionSettings,
    *,
    baselines: Mapping[str, Task] | None = None,
    further: Sequence[Task] = (),
) -> Task:
    """Fuse members and measure everything on held-out blocks of their domains.

    Held-out blocks that lie in the train text of any domain or of the base are in no figure.

    The result holds `evaluation` (as `Evaluation.to_json`), `calibration` (the loss matrix that
    forecasts are made from), `gains` (by router label and reference), `routers` (guard, seconds),
    `members` (domain, record losses, adapter bytes), `overlap` (as `summarise_overlap`), `clusters`
    (of held-out documents, by domain). The folder keeps the bank's columns.

    Args:
        name: For people.
        base: The base everyone shares.
        members: Contributors; several may share a corpus.
        settings: How.
        baselines: Tasks of models measured beside: with `adapter/` for this base, or with
            `held_out.safetensors`, losses (N_domain, T-1) by domain on the first held-out blocks.
        further: Corpora of domains that are measured without a contributor.
    """
    others = dict(baselines or {})
    base_text = plan_base_text(base)
    domains = list(dict.fromkeys([m.corpus.key for m in members] + [t.key for t in further]))
    return Task(
        name=name,
        action="fuse-members",
        settings={
            "fusion": settings.model_dump(mode="json"),
            "members": [member.name for member in members],
            "baselines": sorted(others),
            "further": len(further),
            "base_text": len(base_text),
        },
        needs=(
            base,
            *(task for member in members for task in (member.adapter, member.corpus)),
            *(others[label] for label in sorted(others)),
            *further,
            *base_text,
        ),
        version=2,
        seconds=20 + 4.0 * len(domains) * (len(members) + 1),
    )


def plan_base_text(base: Task) -> list[Task]:
    """Corpora on whose train splits a base was trained; none of a base from elsewhere."""
    found: dict[str, Task] = {}
    for task in base.walk():
        if task.action == "make-base" and task.settings["source"] == "builtin":
            corpora = [plan_corpus(task, domain) for domain in task.settings["domains"]]
        else:
            corpora = [task] if task.action in ("prepare-domain", "prepare-part") else []
        found |= {corpus.key: corpus for corpus in corpora}
    return list(found.values())


def plan_mean(name: str, fusions: Sequence[Task]) -> Task:
    """The mean over seeds of fusions on the same held-out blocks, intervals by cluster."""
    return Task(
        name=name,
        action="average-fusions",
        settings={},
        needs=tuple(fusions),
        seconds=5,
    )
