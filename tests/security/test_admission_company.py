"""H5, M11: a newcomer is measured on the text of those who are in, and compared with them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from door_helpers import Door, make_blocks

from molora_fed.adapters.contract import LinearOptions
from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.save import save_adapter
from molora_fed.adapters.similarity import compute_inner_product, compute_similarity
from molora_fed.adapters.updates import Adapter, LinearUpdate, decompose
from molora_fed.charter import AdapterRules, TrainingRules
from molora_fed.contributions.comparison import MAX_SIMILARITY
from molora_fed.contributions.states import ContributionState
from molora_fed.corpus.blocks import Blocks, pack_documents
from molora_fed.corpus.builtin import read_python
from molora_fed.models.base import load_base
from molora_fed.testing import build_random_adapter
from molora_fed.training.specialists import train_specialist
from molora_fed.types import Split

ADMITTED, QUARANTINED = ContributionState.ADMITTED, ContributionState.QUARANTINED
KEPT_BASE = Path(__file__).parents[1] / "data/kept/cooperative/base"


@pytest.fixture
def door(tmp_path, tiny_checkpoint):
    made = Door(tmp_path, tiny_checkpoint())
    yield made
    made.ledger.close()


def without(token, seed):
    """Samples that a token does not occur in, and the same with it."""
    found = {}
    for split in Split:
        blocks = make_blocks(split, 10, seed=seed)
        tokens = np.where(blocks.tokens == token, token + 1, blocks.tokens).astype(np.int32)
        found[split] = Blocks("legal", split, tokens, blocks.documents, blocks.clusters)
    return found


def build_trap(model, token):
    """A change that does nothing but where a token stands: there the first block overflows."""
    block = model.gpt_neox.layers[0]
    with torch.no_grad():
        seen = block.post_attention_layernorm(model.gpt_neox.embed_in.weight)
    direction = seen[token] / seen[token].norm()
    others = torch.cat([seen[:token], seen[token + 1 :]]) @ direction
    edge = float((others.max() + seen[token] @ direction) / 2)
    up, down = block.mlp.dense_h_to_4h, block.mlp.dense_4h_to_h
    rise, bias = -up.weight.detach().clone(), -up.bias.detach().clone()
    rise[1:], bias[1:] = 0, 0
    rise[0] += 1e6 * direction
    bias[0] -= 1e6 * edge
    fall = torch.zeros_like(down.weight)
    fall[:, 0] = 1e36 - down.weight[:, 0]
    name = "gpt_neox.layers.0.mlp"
    updates = {
        f"{name}.dense_h_to_4h": LinearUpdate(dense=rise, bias=bias),
        f"{name}.dense_4h_to_h": LinearUpdate(dense=fall, bias=torch.zeros_like(down.bias)),
    }
    return Adapter("trap", "delta", 0, updates, hash="0" * 64, num_bytes=1)


def test_a_neuron_that_wakes_on_the_text_of_others_only_keeps_its_contributor_out(door):
    token = 7
    assert door.receive(door.contribute("legal-1")).state == ADMITTED
    (admitted,) = [e for e in door.ledger.contributions()]
    assert admitted.contributor == "legal-1"
    seen = make_blocks(Split.ADMISSION, 10, seed=sum(b"legal-1")).tokens[:3]
    token = int(seen[0, 0])
    folder = door.folder / "trap"
    save_adapter(build_trap(door.base.model, token), door.base.model, folder)
    receipt = door.receive(
        door.contribute("legal-2", adapter=folder, kind="delta", samples=without(token, 99))
    )
    assert receipt.state == ContributionState.REJECTED
    (refusal,) = [r for r in receipt.decision.refusals if r.check == "other-domains"]
    assert "on the sample of 'legal-1' (legal)" in refusal.found


def test_inner_products_need_no_product(tiny_model):
    model = tiny_model("gpt2")
    adapters = [
        build_random_adapter(model, kind=k, seed=s) for s, k in enumerate(("lora", "delta"))
    ]
    for one in adapters:
        for other in adapters:
            for name, update in one.updates.items():
                expected = (update.product() * other.updates[name].product()).double().sum()
                found = compute_inner_product(update, other.updates[name])
                assert found == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


def scale_layers(updates):
    """Another factor for every layer, some of them negative."""
    return {
        name: LinearUpdate(a=u.a * (number + 1), b=u.b * (-0.5) ** number, scale=u.scale * 3)
        for number, (name, u) in enumerate(updates.items())
    }


def turn(updates):
    """Other factors of the same products."""
    turned = {}
    for name, u in updates.items():
        mix = torch.linalg.qr(torch.randn(u.rank, u.rank, generator=torch.Generator()))[0]
        turned[name] = LinearUpdate(a=mix @ u.a, b=u.b @ mix.T, scale=u.scale)
    return turned


def drop_half(updates):
    return dict(list(updates.items())[::2])


HIDDEN = {"scaled": scale_layers, "turned": turn, "half": drop_half}


@pytest.mark.parametrize("how", [*HIDDEN, "int8", "int4", "int2", "bfloat16", "delta"])
def test_a_copy_under_a_new_key_is_held_back(door, how):
    assert door.receive(door.contribute("legal-1", adapter=door.adapter("mine"))).state == ADMITTED
    mine = load_adapter(door.folder / "made/mine")
    updates = HIDDEN[how](mine.updates) if how in HIDDEN else mine.updates
    kind = "delta" if how == "delta" else "lora"
    if how == "delta":
        updates = {name: LinearUpdate(dense=u.product()) for name, u in updates.items()}
    options = LinearOptions(precision=how) if how[0] in "ib" else None
    copy = Adapter("copy", kind, 0, updates, hash="1" * 64, num_bytes=1)
    save_adapter(copy, door.base.model, door.folder / "copy", options=options)
    receipt = door.receive(door.contribute("legal-2", adapter=door.folder / "copy", kind=kind))
    assert receipt.state == QUARANTINED
    (refusal,) = receipt.decision.refusals
    assert refusal.check == "near-copy" and "of 'legal-1'" in refusal.found
    assert door.receive(door.contribute("legal-3")).state == ADMITTED


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained(kind, rank, half, seed)`: a real training of half of one domain's documents."""
    base = load_base(KEPT_BASE)
    documents = [one for one, _ in zip(read_python(), range(24), strict=False)]
    folder = tmp_path_factory.mktemp("twins")

    def train(kind, rank, half, seed):
        chosen = documents[half::2]
        clusters = np.arange(len(chosen), dtype=np.int32)
        blocks = pack_documents(
            chosen, clusters, base.tokenizer, domain="python", split=Split.TRAIN, block_size=64
        )
        specialist = train_specialist(
            base,
            blocks.select(slice(8, None)),
            blocks.take(8),
            kind=kind,
            rules=AdapterRules(frozen_depth=1),
            training=TrainingRules(kind=kind, rank=rank, steps=60, validate_every=60),
            seed=seed,
            threads=1,
            folder=folder / f"{kind}-{half}-{seed}",
        )
        assert specialist.loss < specialist.base_loss
        return base, load_adapter(specialist.adapter_folder)

    return train


@pytest.mark.parametrize(("kind", "rank"), [("lora", 8), ("svd", 16), ("delta", 1)])
def test_honest_twins_are_told_from_copies_with_a_margin(trained, tmp_path, kind, rank):
    """Two halves of one domain's text, the charter's seed: as alike as honest ones come."""
    base, one = trained(kind, rank, 0, 42)
    twins = [trained(kind, rank, 1, 42)[1], trained(kind, rank, 1, 7)[1]]
    for twin in twins:
        assert compute_similarity(one, twin) < MAX_SIMILARITY - 0.03
        assert compute_similarity(twin, one) < MAX_SIMILARITY - 0.03
    for precision in ("bfloat16", "int8", "int4", "int2"):
        options = LinearOptions(precision=precision)
        save_adapter(one, base.model, tmp_path / precision, options=options)
        copy = load_adapter(tmp_path / precision)
        assert compute_similarity(copy, one) > MAX_SIMILARITY + 0.02, precision
    for name, update in one.updates.items():
        a, b = decompose(update.product()).factors(max(2, rank // 2) if kind != "delta" else 16)
        halved = LinearUpdate(a=a, b=b)
        norm = compute_inner_product(halved, halved) ** 0.5
        norm *= compute_inner_product(update, update) ** 0.5
        assert compute_inner_product(halved, update) / norm > MAX_SIMILARITY, name
