"""Base and contributions of a tiny cooperative, with mixed kinds and one domain twice."""

from dataclasses import replace

import numpy as np

from molora_fed.charter import AdapterRules, Amendment, Charter, CorpusRules, FusionRules, Identity
from molora_fed.cooperative.publish import measure_statistics
from molora_fed.fusion.fuse import fuse_texts
from molora_fed.fusion.local_members import LocalMembers, drop_text
from molora_fed.fusion.private_texts import PrivateTexts
from molora_fed.models.base import load_base
from molora_fed.testing.cooperatives import BLOCK_SIZE, build_contributed


def build_charter(base, **fusion):
    rules = {"compare": ("evidence-zero",), **fusion}
    return Charter(
        identity=Identity(
            name="tiny",
            base=base.identity(),
            adapters=AdapterRules(frozen_depth=1),
            corpus=CorpusRules(block_size=BLOCK_SIZE, evaluation_batch=8),
        ),
        amendment=Amendment(seed=7, fusion=FusionRules(**rules)),
    )


def build_cooperative(checkpoint, folder):
    """The base and three contributions of two domains."""
    base = load_base(checkpoint)
    contributions = [
        build_contributed(base, folder, "law-1", "law", seed=1),
        build_contributed(base, folder, "art-1", "art", seed=2, kind="delta"),
        build_contributed(base, folder, "law-2", "law", seed=3, kind="svd"),
    ]
    # The second contributor of the domain has text of the same kind as the first.
    first, _, second = contributions
    contributions[2] = replace(
        second,
        **{
            name: replace_tokens(getattr(first, name), seed)
            for seed, name in enumerate(("held_out", "calibration", "admission"))
        },
    )
    return base, contributions


def replace_tokens(blocks, seed):
    """Other blocks of the same kind: the rows in another order, rolled by a few tokens."""
    order = np.random.default_rng(seed).permutation(len(blocks))
    return replace(blocks, tokens=np.ascontiguousarray(np.roll(blocks.tokens[order], 3, axis=1)))


def publish(charter, summing="masked", mode="statistics"):
    identity = charter.identity.model_copy(update={"privacy_mode": mode, "summing": summing})
    return charter.model_copy(update={"identity": identity})


def fuse_apart(base, charter, contributions, folder, plugins):
    """As members who keep their text, with their statistics beside the adapters."""
    experts = []
    for one in contributions:
        path = folder / f"{one.contributor}.safetensors"
        if charter.publishes_statistics:
            found = measure_statistics(base, charter, one.calibration, folder / "states")
            found.save(path)
        statistics = path if charter.publishes_statistics else None
        experts.append(replace(drop_text(one), statistics=statistics))
    asked = LocalMembers.open(base, charter, contributions, experts, folder, plugins=plugins)
    texts = PrivateTexts(experts, asked)
    return fuse_texts(base, charter, texts, folder / "coordinator", plugins=plugins), asked
