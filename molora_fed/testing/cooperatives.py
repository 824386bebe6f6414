"""A whole cooperative of tiny random specialists: signed contributions without any training.

An expert's own samples are what it predicts best, so each specialist is good at its domain, which
is text drawn from itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.save import save_adapter
from molora_fed.adapters.updates import Adapter
from molora_fed.charter import (
    AdapterRules,
    Amendment,
    CorpusRules,
    FusionRules,
    PrivacyRules,
    SampleRules,
    TrainingRules,
)
from molora_fed.contributions.admission import AdmissionCandidate
from molora_fed.contributions.build import build_contribution, measure_start_loss
from molora_fed.contributions.contributed import Contributed
from molora_fed.contributions.manifest import Contribution, load_contribution
from molora_fed.cooperative.cooperative import Cooperative, create_cooperative, open_cooperative
from molora_fed.corpus.blocks import Blocks
from molora_fed.models.base import Base, load_base
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.storage.files import hash_bytes, make_home
from molora_fed.storage.keys import load_or_make_key
from molora_fed.testing.models import build_random_adapter, build_tiny_checkpoint
from molora_fed.types import Split

__all__ = [
    "BLOCK_SIZE",
    "TinyCooperative",
    "build_candidate",
    "build_contributed",
    "build_tiny_contribution",
    "build_tiny_cooperative",
    "draw_blocks",
    "found_tiny_cooperative",
    "open_tiny_cooperative",
]

BLOCK_SIZE = 32
DOCUMENT_SIZE = 16
SAMPLES = SampleRules(calibration=12, admission=6, held_out=12)
CONTRIBUTORS = {"law-1": "law", "art-1": "art"}
"""Domains by contributor of a usual tiny cooperative."""


def draw_blocks(
    model: Any, adapter: Adapter | None, domain: str, split: Split, count: int, seed: int
) -> Blocks:
    """Blocks of 32 tokens drawn from a specialist; two documents a block.

    Args:
        model: The base model.
        adapter: Its adapter; None draws from the base.
        domain: Domain the blocks are of.
        split: Split they are of.
        count: How many.
        seed: Of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 256, (count, 1), generator=generator)
    with applied(model, adapter), torch.no_grad():
        while tokens.shape[1] < BLOCK_SIZE:
            probabilities = model(tokens).logits[:, -1].softmax(-1)
            tokens = torch.cat(
                [tokens, torch.multinomial(probabilities, 1, generator=generator)], dim=1
            )
    documents = np.arange(count * BLOCK_SIZE, dtype=np.int32).reshape(count, -1) // DOCUMENT_SIZE
    return Blocks(domain, split, tokens.numpy().astype(np.int32), documents, documents // 2)


def build_contributed(
    base: Base,
    folder: Path,
    name: str,
    domain: str,
    *,
    seed: int,
    kind: str = "lora",
    calibration: int = SAMPLES.calibration,
) -> Contributed:
    """What a fusion takes of a contribution: a random adapter and text drawn from it.

    Args:
        base: The base.
        folder: Gets the adapter's folder, named after the contributor.
        name: Contributor.
        domain: Its domain.
        seed: Of adapter and text.
        kind: See `build_random_adapter`.
        calibration: Calibration blocks; 0 for none.
    """
    adapter = build_random_adapter(
        base.model, kind=kind, seed=seed, rank=4, frozen_depth=1, strength=3.0, name=name
    )
    save_adapter(adapter, base.model, folder / name)
    adapter = load_adapter(folder / name)
    splits = {
        Split.CALIBRATION: calibration,
        Split.ADMISSION: SAMPLES.admission,
        Split.HELD_OUT: SAMPLES.held_out,
    }
    blocks = {
        split: draw_blocks(base.model, adapter, domain, split, count, seed=100 * seed + n)
        for n, (split, count) in enumerate(splits.items())
    }
    return Contributed(
        id=hash_bytes(name.encode()),
        contributor=name,
        domain=domain,
        adapter=folder / name,
        held_out=blocks[Split.HELD_OUT],
        calibration=blocks[Split.CALIBRATION] if calibration else None,
        admission=blocks[Split.ADMISSION],
        contamination=0.01,
        training={"steps": 10, "tokens": 320, "threads": 1, "seed": seed, "kind": kind},
    )


def found_tiny_cooperative(folder: Path, base: Base, **fusion: Any) -> Cooperative:
    """A pooled cooperative without contributions, with blocks of 32 tokens and frozen depth 1.

    Args:
        folder: The coordinator's home.
        base: The base, wherever its checkpoint is.
        fusion: Rules of the charter's `[amendment.fusion]` other than their defaults.
    """
    return create_cooperative(
        folder,
        "tiny",
        base,
        adapters=AdapterRules(frozen_depth=1),
        corpus=CorpusRules(block_size=BLOCK_SIZE, evaluation_batch=8),
        amendment=Amendment(
            samples=SAMPLES, fusion=FusionRules(**fusion), training=TrainingRules(rank=4), seed=7
        ),
        privacy=PrivacyRules(mode="pooled"),
    )


def build_tiny_contribution(
    cooperative: Cooperative,
    base: Base,
    folder: Path,
    name: str,
    domain: str,
    *,
    seed: int,
    **changes: Any,
) -> Contribution:
    """A signed contribution that is good, made without training.

    Args:
        cooperative: Whose charter it is made under.
        base: Its base.
        folder: Gets the contribution in a folder of its name, its adapter and its key beside.
        name: Contributor.
        domain: Its domain.
        seed: Of adapter and text.
        changes: What is stated otherwise, see `build_contribution`.
    """
    made = build_contributed(base, folder / "adapters", name, domain, seed=seed)
    samples = {
        split: blocks
        for split, blocks in (
            (Split.CALIBRATION, made.calibration),
            (Split.ADMISSION, made.admission),
            (Split.HELD_OUT, made.held_out),
        )
        if blocks is not None
    }
    charter = cooperative.charter
    stated = {
        "adapter": made.adapter,
        "kind": "lora",
        "samples": samples,
        "key": load_or_make_key(folder / "keys" / f"{name}.pem"),
        "charter": charter,
        "contributor": name,
        "domain": domain,
        "training": made.training,
        "base_loss": 3.0,
        "specialist_loss": 2.0,
        "start_loss": measure_start_loss(base.model, samples, charter, domain=domain),
    }
    return build_contribution(folder / name, **{**stated, **changes})


@dataclass(frozen=True, eq=False)
class TinyCooperative:
    """A cooperative on disk, and contributions to it that nobody has admitted yet.

    Attributes:
        cooperative: The coordinator's home, with its base.
        base: Its base.
        contributions: Folders of signed contributions by contributor;
            `fuse_contributions(cooperative, list(contributions.values()))` fuses them.
    """

    cooperative: Cooperative
    base: Base
    contributions: Mapping[str, Path]


def build_tiny_cooperative(
    folder: Path,
    contributors: Mapping[str, str] = CONTRIBUTORS,
    *,
    architecture: str = "gpt_neox",
    **fusion: Any,
) -> TinyCooperative:
    """Make a tiny base, found a cooperative with it, and build contributions to it.

    Args:
        folder: Gets `cooperative/` and `contributions/`.
        contributors: Domains by contributor.
        architecture: See `molora_fed.testing.ARCHITECTURES`.
        fusion: Rules of the charter's `[amendment.fusion]` other than their defaults; no router is
            compared unless some are named.
    """
    home = folder / "cooperative"
    make_home(home)
    base = load_base(build_tiny_checkpoint(home / "base", architecture))
    cooperative = found_tiny_cooperative(home, base, **{"compare": (), **fusion})
    for seed, (name, domain) in enumerate(contributors.items(), start=1):
        build_tiny_contribution(
            cooperative, base, folder / "contributions", name, domain, seed=seed
        )
    return open_tiny_cooperative(folder, base)


def open_tiny_cooperative(folder: Path, base: Base | None = None) -> TinyCooperative:
    """Open what `build_tiny_cooperative` made, or a copy of it.

    Args:
        folder: With `cooperative/` and `contributions/`.
        base: Its base, if it is loaded already.
    """
    cooperative = open_cooperative(folder / "cooperative")
    manifests = sorted((folder / "contributions").glob("*/manifest.json"))
    made = {path.parent.name: path.parent for path in manifests}
    return TinyCooperative(cooperative, base or cooperative.load_base(), made)


def build_candidate(
    tiny: TinyCooperative, name: str = "law-1", *, plugins: Plugins | None = None
) -> AdmissionCandidate:
    """What an admission check looks at: a contribution, beside the others as admitted ones.

    Args:
        tiny: The cooperative.
        name: Whose contribution.
        plugins: Where adapter kinds are looked up; the installed plugins by default.
    """
    made = {who: load_contribution(folder) for who, folder in tiny.contributions.items()}
    return AdmissionCandidate(
        contribution=made.pop(name),
        charter=tiny.cooperative.charter,
        base=tiny.base,
        plugins=plugins or get_plugins(),
        others=tuple(made.values()),
    )
