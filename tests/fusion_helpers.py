"""A cooperative of tiny random experts, each with text drawn from itself as its domain.

An expert's own samples are what it predicts best, so specialists are good at their domains without
any training.
"""

from dataclasses import replace

import numpy as np
import torch

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.save import save_adapter
from molora_fed.charter import AdapterRules, Amendment, Charter, CorpusRules, FusionRules, Identity
from molora_fed.contributions.contributed import Contributed
from molora_fed.cooperative.publish import measure_statistics
from molora_fed.corpus.blocks import Blocks
from molora_fed.fusion.fuse import fuse_texts
from molora_fed.fusion.local_members import LocalMembers, drop_text
from molora_fed.fusion.private_texts import PrivateTexts
from molora_fed.models.base import load_base
from molora_fed.storage.files import hash_bytes
from molora_fed.testing import build_random_adapter
from molora_fed.types import Split

BLOCK_SIZE = 32
DOCUMENT_SIZE = 16


def sample_blocks(model, adapter, domain, split, count, seed):
    """Blocks of `count` x 32 tokens drawn from the specialist; two documents a block."""
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


def build_contributed(base, folder, name, domain, *, seed, kind="lora", calibration=12):
    adapter = build_random_adapter(
        base.model, kind=kind, seed=seed, rank=4, frozen_depth=1, strength=3.0, name=name
    )
    save_adapter(adapter, base.model, folder / name)
    adapter = load_adapter(folder / name)
    splits = {
        Split.CALIBRATION: calibration,
        Split.ADMISSION: 6,
        Split.HELD_OUT: 12,
    }
    blocks = {
        split: sample_blocks(base.model, adapter, domain, split, count, seed=100 * seed + n)
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
