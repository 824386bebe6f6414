import numpy as np
import pytest
import torch
from adaptation_helpers import DOMAINS, build_all_states, build_counting_blocks, build_router
from hypothesis import given, settings
from hypothesis import strategies as st

from molora_fed.bank import passes
from molora_fed.bank.states import BaseStates, build_states, take_balanced
from molora_fed.errors import PopulationError, StorageError
from molora_fed.models.base import load_base
from molora_fed.models.forward import compute_block_losses
from molora_fed.population.losses import compute_mean_gates

BOTH = frozenset({"base_hidden", "embeddings"})


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return load_base(tiny_checkpoint())


def make_states(*counts):
    """States without any model, of as many blocks as said."""
    return [
        BaseStates(build_counting_blocks(domain, count), torch.zeros(count, 16))
        for domain, count in zip(DOMAINS, counts, strict=False)
    ]


def test_states_are_those_of_the_model(base, tmp_path):
    up, down = build_all_states(base, tmp_path, BOTH)
    assert (up.domain, down.domain) == ("up", "down")
    rows = [7, 0, 3]
    batch = up.take(rows)
    tokens = torch.from_numpy(up.blocks.tokens[rows]).long()
    assert torch.equal(batch.tokens, tokens)
    assert torch.equal(batch.view.document_starts[0].nonzero().flatten(), torch.tensor([0, 8]))
    with torch.no_grad():
        hidden = base.model.gpt_neox(input_ids=tokens).last_hidden_state
    assert torch.allclose(batch.view.base_hidden, hidden, atol=1e-5)
    assert torch.equal(batch.view.embeddings, base.model.get_input_embeddings()(tokens))
    expected = compute_block_losses(base.model, up.blocks.tokens)
    assert torch.equal(up.nll(), expected)


def test_only_what_is_read_is_kept_and_nothing_is_run_twice(base, tmp_path, monkeypatch):
    (state, _) = build_all_states(base, tmp_path, frozenset())
    assert state.hidden is None and state.table is None
    assert state.take([0]).view.base_hidden is None
    assert not list(tmp_path.glob("hidden-*"))
    build_all_states(base, tmp_path, BOTH)
    monkeypatch.setattr(passes, "run_blocks", lambda *a, **k: pytest.fail("ran the base again"))
    again = build_all_states(base, tmp_path, BOTH)
    assert again[0].take([1]).view.base_hidden.shape == (1, 16, 32)


def test_progress_and_lack_of_room(base, tmp_path, monkeypatch):
    calls = []
    blocks = [build_counting_blocks(domain) for domain in DOMAINS]
    build_states(base, blocks, BOTH, tmp_path, batch=8, progress=lambda *a, **k: calls.append(a))
    assert calls == [(8, 12), (12, 12)] * 2
    monkeypatch.setattr(passes.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(StorageError, match="expected 50688 free bytes, got 10"):
        build_states(base, blocks, BOTH, tmp_path / "other")
    build_states(base, blocks, BOTH, tmp_path, batch=8)  # nothing is missing: no room is needed


def test_a_deleted_column_is_named(base, tmp_path, monkeypatch):
    monkeypatch.setattr(passes.ColumnMaker, "run", lambda *a, **k: None)
    with pytest.raises(PopulationError, match=r"columns just written, got none\. Let no other"):
        build_all_states(base, tmp_path)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_batches_have_equally_many_blocks_of_every_domain(first, second, share, seed):
    states = make_states(first, second)
    sizes = {"up": first, "down": second}
    seen = {"up": [], "down": []}
    for step in range(6):
        batch = take_balanced(states, step, batch=2 * share, seed=seed)
        again = take_balanced(states, step, batch=2 * share, seed=seed)
        assert torch.equal(batch.tokens, again.tokens)
        rising = batch.tokens[:, 1] > batch.tokens[:, 0]
        assert int(rising.sum()) == share and len(rising) == 2 * share
        for state, rows in zip(states, batch.tokens.split(share), strict=True):
            seen[state.domain] += [
                int(np.where((state.blocks.tokens == row).all(1))[0][0]) for row in rows.numpy()
            ]
    for domain, rows in seen.items():  # no block is seen again before all were once
        whole = len(rows) // sizes[domain] * sizes[domain]
        counts = np.bincount(rows[:whole], minlength=sizes[domain]) if whole else np.zeros(1)
        unique = len(np.unique(states[list(DOMAINS).index(domain)].blocks.tokens, axis=0))
        assert unique < sizes[domain] or counts.max() - counts.min() == 0


def test_a_batch_that_cannot_be_shared_is_refused():
    for batch in (3, 1, 0):
        with pytest.raises(PopulationError, match=f"got {batch} blocks for 2 domains"):
            take_balanced(make_states(4, 4), 0, batch=batch, seed=0)
    with pytest.raises(PopulationError, match="none of down"):
        take_balanced(make_states(4, 0), 0, batch=2, seed=0)
    with pytest.raises(PopulationError, match="2 blocks for 0 domains"):
        take_balanced([], 0, batch=2, seed=0)


def test_mean_gates_are_those_of_the_positions_that_predict(base, tmp_path):
    states = build_all_states(base, tmp_path)
    router = build_router()
    found = compute_mean_gates(router, states, batch=5)
    with torch.no_grad():
        gates = [router(state.take(range(12)).view)[:, :-1].mean((0, 1)) for state in states]
    assert np.allclose(found, torch.stack(gates).numpy(), atol=1e-6)
    assert found.shape == (2, 3)
