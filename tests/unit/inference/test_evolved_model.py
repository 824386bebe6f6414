"""An evolved model on disk, its text, and its held-out figures."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from adaptation_helpers import build_counting_blocks, build_population, build_router
from molora_evolution.routers import SoftmaxEmbeddingMeanOptions, SoftmaxEmbeddingMeanRouter

from molora_fed.bank.states import build_states
from molora_fed.errors import BaseCheckpointError, ConfigError, PopulationError
from molora_fed.inference import shared_inputs
from molora_fed.inference.expert_layers import ExpertLinear
from molora_fed.inference.fused_build import build_causal_lm
from molora_fed.inference.generate import Sampling, generate
from molora_fed.models.base import load_base
from molora_fed.models.layout import decoder_blocks
from molora_fed.population.bundle import EvolvedModel, find_evolved, load_evolved, save_evolved
from molora_fed.population.evolution import Branch
from molora_fed.population.files import fingerprint_population
from molora_fed.population.losses import evaluate_population
from molora_fed.population.mixture import Mixture
from molora_fed.population.router_files import pack_router
from molora_fed.population.slots import make_population
from molora_fed.testing.models import build_random_adapter


def build_evolved(base, name="parallel-sigmoid"):
    router = build_router()
    if name != "parallel-sigmoid":
        options = SoftmaxEmbeddingMeanOptions()
        router = SoftmaxEmbeddingMeanRouter.build(3, base.hidden_size, options, 1)
    with torch.no_grad():  # gates that differ by token and slot
        router.weight.copy_(torch.randn(router.weight.shape, generator=torch.manual_seed(3)))
    return EvolvedModel(base, build_population(base), router.eval(), name)


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return load_base(tiny_checkpoint())


@pytest.fixture
def saved(base, tmp_path):
    evolved = build_evolved(base)
    branch = Branch(evolved.population, evolved.router)
    save_evolved(base, branch, "parallel-sigmoid", tmp_path / "evolution" / "evolved")
    return evolved, tmp_path / "evolution" / "evolved"


@pytest.mark.parametrize("name", ["parallel-sigmoid", "softmax-embedding-mean"])
@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "gemma2", "gpt2"])
def test_text_read_piece_by_piece_is_text_read_at_once(tiny_checkpoint, tmp_path, kind, name):
    base = load_base(tiny_checkpoint(kind))
    evolved = build_evolved(base, name)
    blocks = build_counting_blocks("up", count=2)
    reads = type(evolved.router).reads(evolved.router.options)
    batch = build_states(base, [blocks], reads, tmp_path)[0].take([0, 1])
    with torch.no_grad():
        gates = evolved.router(batch.view)
        with Mixture(base.model, evolved.population).mixed(gates):
            whole = base.model(input_ids=batch.tokens).logits.log_softmax(-1)
    starts = torch.from_numpy(blocks.document_starts)
    lm, cache, steps = build_causal_lm(evolved), None, []
    for a, b in ((0, 5), (5, 6), (6, 7), (7, 16)):
        piece = batch.tokens[:, a:b]
        steps.append(
            lm(piece, past_key_values=cache, use_cache=True, document_starts=starts[:, a:b])
        )
        cache = steps[-1].past_key_values
    assert torch.cat([step.gates for step in steps], 1).allclose(gates, atol=1e-5)
    assert torch.cat([step.logits for step in steps], 1).allclose(whole, atol=1e-4)


def test_given_gates_need_no_pass_of_the_base(base):
    evolved, tokens = build_evolved(base), torch.arange(1, 13).view(2, 6)
    lm, gates = build_causal_lm(evolved), torch.tensor([[0.2, 0.7, 0.1], [1.0, 0.0, 0.0]])
    lm(tokens)  # lays the layers out
    passes = []
    handle = lm.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    found = lm(tokens, gates=gates)
    assert len(passes) == 1 and torch.equal(found.gates, gates[:, None].expand(-1, 6, -1))
    lm(tokens, gates=torch.full((2, 3), torch.nan))
    assert len(passes) == 3  # the router reads the base's states
    handle.remove()
    with torch.no_grad(), Mixture(base.model, evolved.population).mixed(found.gates):
        expected = base.model(input_ids=tokens).logits.log_softmax(-1)
    torch.testing.assert_close(found.logits, expected, atol=1e-4, rtol=1e-4)
    first = lm(tokens[:, :4], gates=gates, use_cache=True)
    rest = lm(tokens[:, 4:], gates=gates, past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, expected[:, 4:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "gemma2", "gpt2"])
def test_blocks_that_no_slot_changes_run_once(tiny_checkpoint, kind):
    base = load_base(tiny_checkpoint(kind))
    adapters = [
        build_random_adapter(base.model, rank=2, seed=seed, frozen_depth=1) for seed in (1, 2, 3)
    ]
    named = [(adapter.name, None, adapter) for adapter in adapters]
    evolved = replace(build_evolved(base), population=make_population(base, named, num_slots=3))
    lm, tokens = build_causal_lm(evolved), torch.arange(1, 25).view(2, 12)
    found = lm(tokens)
    with torch.no_grad(), Mixture(base.model, evolved.population).mixed(found.gates):
        expected = base.model(input_ids=tokens).logits.log_softmax(-1)
    torch.testing.assert_close(found.logits, expected, atol=1e-4, rtol=1e-4)

    _, blocks = decoder_blocks(lm.model)
    given = [[], []]
    for block, kept in zip(blocks, given, strict=False):
        layer = next(m for m in block.modules() if isinstance(m, ExpertLinear))
        layer.register_forward_hook(lambda _m, _a, _o, kept=kept: kept.append(1))
    cache, steps = None, []
    for a, b in ((0, 5), (5, 6), (6, 12)):
        mask = torch.ones(2, b, dtype=torch.long)
        steps.append(lm(tokens[:, a:b], attention_mask=mask, past_key_values=cache, use_cache=True))
        cache = steps[-1].past_key_values
        cache.batch_select_indices(torch.tensor([0, 1]))
    torch.testing.assert_close(torch.cat([s.logits for s in steps], 1), expected, atol=1e-4, rtol=0)
    assert len(given[1]) == 6 and len(given[0]) == (6 if kind == "gemma2" else 3)

    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    first = lm(padded[:, :7], attention_mask=mask[:, :7], use_cache=True)
    rest = lm(padded[:, 7:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, expected[:, 4:], atol=1e-4, rtol=0)


def test_packed_layers_say_the_same_with_the_base_read_first(base, monkeypatch):
    evolved, tokens = build_evolved(base), torch.arange(1, 13).view(2, 6)
    found = build_causal_lm(evolved)(tokens)
    monkeypatch.setattr(shared_inputs, "_SMALL", 0)
    packed = build_causal_lm(evolved)(tokens)
    torch.testing.assert_close(packed.logits, found.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed.gates, found.gates, atol=1e-4, rtol=1e-4)


def test_generating_is_deterministic_and_leaves_the_base_alone(base):
    evolved = build_evolved(base)
    before = {n: v.clone() for n, v in base.model.state_dict().items()}
    sampling = Sampling(max_new_tokens=6, temperature=1.0, seed=4)
    first, again = (generate(build_causal_lm(evolved), ["ab", ""], sampling) for _ in range(2))
    assert first == again and len(first) == 2
    assert first[0].gates.keys() == {"g0-s0", "g0-s1", "g0-s2"}
    assert all(torch.equal(v, before[n]) for n, v in base.model.state_dict().items())
    greedy = generate(build_causal_lm(evolved), "ab", Sampling(max_new_tokens=3))[0]
    assert len(greedy.tokens) == 3 or greedy.is_finished
    with pytest.raises(ConfigError, match="expected at most 128"):
        generate(build_causal_lm(evolved), "ab", Sampling(max_new_tokens=500))


def test_saved_and_loaded_again_wherever_it_was_moved(saved, base, tmp_path):
    evolved, folder = saved
    assert find_evolved(tmp_path) == find_evolved(folder) == folder
    assert find_evolved(folder / "population") is None
    loaded = load_evolved(folder)
    assert fingerprint_population(loaded.population) == fingerprint_population(evolved.population)
    name = evolved.router_name
    assert pack_router(loaded.router, name) == pack_router(evolved.router, name)
    moved = tmp_path / "elsewhere" / "deep" / "model"
    shutil.copytree(folder, moved)
    with pytest.raises(BaseCheckpointError, match="Say where the base is"):
        load_evolved(moved)
    text = generate(build_causal_lm(load_evolved(moved, base_folder=base.folder)), "ab")
    assert text == generate(build_causal_lm(evolved), "ab")


def test_a_damaged_folder_is_refused(saved, tiny_checkpoint):
    _, folder = saved
    other = load_base(tiny_checkpoint("gpt_neox", 1))
    with pytest.raises(BaseCheckpointError):
        load_evolved(folder, base_folder=other.folder)
    manifest = json.loads((folder / "evolved.json").read_text())
    for change, named in (
        ({"router": "0" * 64}, "router: expected SHA-256 000000000000"),
        ({"population": "1" * 64}, "population: expected SHA-256 1111"),
        ({"surprise": 1}, "surprise"),
        ({"base": {**manifest["base"], "path": "/abs"}}, "must be relative"),
    ):
        (folder / "evolved.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(PopulationError, match=named) as caught:
            load_evolved(folder)
        assert "\n" not in str(caught.value)
    (folder / "evolved.json").unlink()
    with pytest.raises(PopulationError, match="No such file"):
        load_evolved(folder)


def test_figures_of_a_population(base, tmp_path):
    evolved = build_evolved(base)
    blocks = [build_counting_blocks(domain, count=6) for domain in ("down", "up")]
    found = evaluate_population(evolved, blocks, tmp_path)
    result = found.to_json()
    assert set(result["losses"]["specialists"]) == {"g0-s0", "g0-s1", "g0-s2"}
    assert set(result["losses"]["fused"]) == {"parallel-sigmoid"}
    # Fresh slots change nothing: each alone is the base.
    assert found.sums["specialist:g0-s1"] == pytest.approx(found.sums["base"], rel=1e-5)
    assert not np.allclose(found.sums["specialist:g0-s0"], found.sums["base"], rtol=1e-3)
    gates = result["gates"]["parallel-sigmoid"]
    assert all(0 < gate < 1 for row in gates.values() for gate in row.values())
    chosen = {"one": (evolved.population, 0)}
    named = evaluate_population(evolved, blocks, tmp_path, alone=chosen)
    assert np.array_equal(named.sums["specialist:one"], found.sums["specialist:g0-s0"])
