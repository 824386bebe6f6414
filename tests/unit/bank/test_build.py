"""Building banks: right numbers, one expert at a time, resumable, nothing stale, nothing half."""

import hashlib
import shutil
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from molora_fed.adapters.compatibility import applied
from molora_fed.bank import (
    Expert,
    build_calibration_bank,
    build_held_out_bank,
    estimate_bank_bytes,
)
from molora_fed.bank.prune import prune_bank, subtract_expert
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import BankError, StorageError
from molora_fed.models.batches import choose_batch
from molora_fed.models.forward import compute_block_losses, run_blocks
from molora_fed.models.states import Capture
from molora_fed.testing import build_random_adapter
from molora_fed.types import Split

ALL = frozenset({"base_hidden", "prefix_hidden", "mean_hidden", "experts_hidden", "evidence"})


def make_base(model, weights="a" * 64):
    return SimpleNamespace(model=model, weights=weights, hidden_size=32)


def make_blocks(domain, count, seed, split=Split.CALIBRATION):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 257, (count, 12), dtype=np.int32)
    documents = np.sort(generator.integers(0, 3, (count, 12), dtype=np.int32), axis=1)
    return Blocks(domain, split, tokens, documents, documents.copy())


CALIBRATION = [make_blocks("two", 5, 1), make_blocks("one", 3, 2), make_blocks("two", 4, 3)]
HELD_OUT = [make_blocks("one", 4, 4, Split.HELD_OUT)]


@pytest.fixture
def base(tiny_model):
    return make_base(tiny_model())


@pytest.fixture
def experts(base):
    return [
        Expert("base", None),
        *(Expert(f"e{i}", build_random_adapter(base.model, seed=i)) for i in (1, 2)),
    ]


def count_passes(model):
    """One for each batch of blocks that the model runs from now on."""
    passes = []

    def note(module, arguments, named, found):
        tokens = arguments[0] if arguments else named["input_ids"]
        if tokens.shape[1] == 12:  # and not the few tokens that a model is tried on
            passes.append(1)

    model.get_decoder().register_forward_hook(note, with_kwargs=True)
    return passes


def hash_folder(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_columns_are_what_each_expert_says(model, tmp_path):
    base = make_base(model)
    adapters = [None, *(build_random_adapter(model, seed=i) for i in (1, 2))]
    experts = [Expert(f"e{i}", adapter) for i, adapter in enumerate(adapters)]
    bank = build_calibration_bank(
        tmp_path, base, experts, CALIBRATION, readings=ALL, batch=4, frozen_depth=1
    )
    view = bank.view(slice(0, 12))
    for index, adapter in enumerate(adapters):
        with applied(model, adapter):
            losses = [compute_block_losses(model, part.tokens, batch=4) for part in CALIBRATION]
            hidden = [
                step.hidden.clone()
                for part in CALIBRATION
                for step in run_blocks(model, part.tokens, batch=4, capture=Capture(hidden=True))
            ]
        assert torch.equal(bank.expert_nll(index), torch.cat(losses))
        assert torch.equal(view.experts_hidden[:, :, index], torch.cat(hidden))
    assert torch.equal(bank.base_nll(), bank.expert_nll(0))
    assert torch.equal(view.base_hidden, view.experts_hidden[:, :, 0])
    torch.testing.assert_close(view.mean_hidden, view.experts_hidden.mean(2))
    prefix = [
        step.prefix.clone()
        for part in CALIBRATION
        for step in run_blocks(model, part.tokens, batch=4, capture=Capture(prefix_depth=1))
    ]
    assert torch.equal(view.prefix_hidden, torch.cat(prefix))


def test_evidence_is_reset_where_documents_start(base, experts, tmp_path):
    bank = build_calibration_bank(tmp_path, base, experts, CALIBRATION)
    starts = torch.from_numpy(np.concatenate([part.document_starts for part in CALIBRATION]))
    view = bank.view(torch.arange(12))
    assert torch.equal(view.document_starts, starts)
    assert (view.evidence[starts] == 0).all()
    assert torch.equal(view.evidence[~starts], bank.logprob[~starts])
    assert view.base_hidden is None
    assert view.mean_hidden is None


def test_blocks_keep_their_order_domains_and_clusters(base, experts, tmp_path):
    bank = build_calibration_bank(tmp_path, base, experts, CALIBRATION)
    assert bank.domains == ("one", "two")
    assert bank.domain_of.tolist() == [1] * 5 + [0] * 3 + [1] * 4
    assert bank.tokens.tolist() == np.concatenate([p.tokens for p in CALIBRATION]).tolist()
    parts = np.split(bank.clusters, [5, 8])
    assert not set(parts[0].ravel()) & set(parts[2].ravel())


def test_base_that_is_no_expert_is_measured_all_the_same(base, experts, tmp_path):
    readings = frozenset({"base_hidden", "mean_hidden"})
    bank = build_calibration_bank(tmp_path, base, experts[1:], CALIBRATION, readings=readings)
    assert not bank.has_base_expert
    assert bank.num_experts == 2
    losses = torch.cat([compute_block_losses(base.model, p.tokens) for p in CALIBRATION])
    assert torch.equal(bank.base_nll(), losses)
    assert bank.view(slice(0, 2)).base_hidden.shape == (2, 12, 32)
    assert bank.experts_hidden is None


def test_no_expert_is_run_twice(base, experts, tmp_path):
    passes = count_passes(base.model)
    build_calibration_bank(tmp_path, base, experts, CALIBRATION, readings=ALL)
    assert len(passes) == 3 * 3
    build_calibration_bank(tmp_path, base, experts, CALIBRATION, readings=ALL)
    build_calibration_bank(tmp_path, base, experts, CALIBRATION)
    assert len(passes) == 3 * 3


def test_a_later_expert_costs_its_own_passes_only(base, experts, tmp_path):
    passes = count_passes(base.model)
    build_calibration_bank(tmp_path, base, experts[:2], CALIBRATION)
    build_calibration_bank(tmp_path, base, experts, [*CALIBRATION, make_blocks("three", 2, 9)])
    assert len(passes) == 2 * 3 + (3 + 3)


@pytest.mark.parametrize("other", ["base", "batch", "blocks", "adapter"])
def test_a_stale_column_is_never_read(base, experts, tmp_path, other):
    blocks = [CALIBRATION[0]]
    build_calibration_bank(tmp_path, base, experts[:2], blocks)
    passes = count_passes(base.model)
    changed = {
        "base": (make_base(base.model, weights="b" * 64), experts[:2], blocks, 16),
        "batch": (base, experts[:2], blocks, 2),
        "blocks": (base, experts[:2], [CALIBRATION[1]], 16),
        "adapter": (base, [experts[0], experts[2]], blocks, 16),
    }[other]
    *arguments, batch = changed
    build_calibration_bank(tmp_path, *arguments, batch=batch)
    assert passes


def test_killed_and_built_again_it_goes_on_and_ends_with_the_same_bytes(base, experts, tmp_path):
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    build_calibration_bank(whole, base, experts, CALIBRATION, readings=ALL)

    def stop(done, total, **fields):
        if done == 12 + 8 and fields.get("expert") == "e1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_calibration_bank(halted, base, experts, CALIBRATION, readings=ALL, progress=stop)
    assert not [p for p in halted.iterdir() if p.name.startswith(".")]
    passes = count_passes(base.model)
    build_calibration_bank(halted, base, experts, CALIBRATION, readings=ALL)
    assert len(passes) < 3 * 3
    assert hash_folder(halted) == hash_folder(whole)


def test_one_adapter_at_a_time_is_in_memory(base, tmp_path):
    alive = []

    def load(seed):
        assert not [ref for ref in alive if ref() is not None]
        adapter = build_random_adapter(base.model, seed=seed)
        alive.append(weakref.ref(adapter))
        return adapter

    experts = [Expert(f"e{i}", lambda i=i: load(i)) for i in range(3)]
    bank = build_calibration_bank(tmp_path, base, experts, CALIBRATION)
    assert bank.num_experts == 3


def test_weights_are_as_before(base, experts, tmp_path):
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    build_calibration_bank(tmp_path, base, experts, CALIBRATION)
    after = base.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_size_is_announced_and_progress_ends_at_the_total(base, experts, tmp_path):
    seen = []
    build_calibration_bank(
        tmp_path,
        base,
        experts,
        CALIBRATION,
        readings=ALL,
        progress=lambda done, total, **fields: seen.append((done, total, fields)),
    )
    announced = seen[0][2]["bank_bytes"]
    on_disk = sum(p.stat().st_size for p in tmp_path.iterdir())
    assert on_disk <= announced <= 2 * on_disk
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][:2] == (36, 36)


def test_estimate_counts_only_what_is_read():
    sizes = {"num_tokens": 1_000_000, "num_experts": 20, "hidden_size": 4096, "itemsize": 2}
    evidence = estimate_bank_bytes(**sizes, readings=frozenset({"evidence"}))
    assert evidence == 1_000_000 * 4 * 41
    logit = estimate_bank_bytes(**sizes, readings=frozenset({"evidence"}), mixture="logit")
    assert logit - evidence == 1_000_000 * 20 * 4096 * 2


def test_no_room_is_found_out_before_the_first_pass(base, experts, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    passes = count_passes(base.model)
    with pytest.raises(StorageError, match="free bytes, got 10"):
        build_calibration_bank(tmp_path, base, experts, CALIBRATION)
    assert not passes


def test_an_expert_that_is_not_finite_is_named(base, experts, tmp_path):
    broken = build_random_adapter(base.model, seed=5)
    next(iter(broken.updates.values())).b.fill_(float("nan"))
    with pytest.raises(BankError, match=r"expert 'bad'.*finite") as error:
        build_calibration_bank(tmp_path, base, [*experts, Expert("bad", broken)], CALIBRATION)
    assert "\n" not in str(error.value)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_cut_off_column_is_refused(base, experts, tmp_path):
    build_calibration_bank(tmp_path, base, experts, CALIBRATION)
    column = sorted(tmp_path.glob("logprob-*"))[0]
    column.write_bytes(column.read_bytes()[:-4])
    with pytest.raises(BankError, match="Delete the file"):
        build_calibration_bank(tmp_path, base, experts, CALIBRATION)


def test_splits_do_not_mix(base, experts, tmp_path):
    with pytest.raises(BankError, match="no held-out blocks"):
        build_calibration_bank(tmp_path, base, experts, HELD_OUT)
    with pytest.raises(BankError, match="only held-out blocks"):
        build_held_out_bank(tmp_path, base, experts, CALIBRATION)
    assert build_held_out_bank(tmp_path, base, experts, HELD_OUT).num_blocks == 4


@pytest.mark.parametrize(
    ("names", "blocks", "reason"),
    [
        ([], CALIBRATION, "got none"),
        (["a", "a"], CALIBRATION, "got a, a"),
        (["a"], [], "got none of any"),
        (["a"], [make_blocks("x", 0, 0)], "got none of x"),
        (["a"], [CALIBRATION[0], CALIBRATION[1].take(0)], "got none of one"),
    ],
)
def test_senseless_plans_are_refused(base, experts, tmp_path, names, blocks, reason):
    plan = [Expert(name, experts[1].adapter) for name in names]
    with pytest.raises(BankError, match=reason):
        build_calibration_bank(tmp_path, base, plan, blocks)


def test_base_must_come_first(base, experts, tmp_path):
    with pytest.raises(BankError, match="Put it first"):
        build_calibration_bank(tmp_path, base, experts[::-1], CALIBRATION)


def test_other_models_are_measured_on_the_same_blocks(base, experts, tmp_path):
    bank = build_held_out_bank(tmp_path, base, experts, HELD_OUT, batch=2)
    other = build_random_adapter(base.model, kind="delta", seed=8)
    with applied(base.model, other):
        expected = compute_block_losses(base.model, HELD_OUT[0].tokens, batch=2)
    assert torch.equal(bank.add_column("weight_average", other), expected)
    passes = count_passes(base.model)
    assert torch.equal(bank.add_column("weight_average", other), expected)
    assert not passes


def test_logit_bank_mixes_logits(base, experts, tmp_path):
    bank = build_calibration_bank(tmp_path, base, experts, CALIBRATION, mixture="logit")
    assert bank.view(slice(0, 1)).experts_hidden is None
    for expert in range(3):
        gates = torch.zeros(12, 12, 3)
        gates[..., expert] = 1.0
        found = bank.nll(gates, slice(0, 12))
        torch.testing.assert_close(found, bank.expert_nll(expert), rtol=1e-4, atol=1e-4)


def mean_of(folder, base, experts, blocks):
    readings = frozenset({"mean_hidden", "evidence"})
    bank = build_calibration_bank(folder, base, experts, blocks, readings=readings)
    return bank.view(slice(0, bank.num_blocks)).mean_hidden.clone()


@pytest.fixture
def four(base, experts):
    return [*experts, Expert("e3", build_random_adapter(base.model, seed=3))]


@pytest.mark.parametrize("first", [(0, 1, 2), (0, 3), (2,), (1, 2, 3)])
def test_the_average_grows_by_the_passes_of_those_who_are_new(base, four, tmp_path, first):
    whole = mean_of(tmp_path / "whole", base, four, CALIBRATION)
    mean_of(tmp_path / "grown", base, [four[i] for i in first], CALIBRATION)
    passes = count_passes(base.model)
    grown = mean_of(tmp_path / "grown", base, four, CALIBRATION)
    assert torch.equal(grown, whole)  # bit by bit, whoever came first
    # The base is measured in any case, and its state is not kept: it runs once more to be added.
    assert len(passes) == 3 * (4 - len(first))
    assert hash_folder(tmp_path / "grown") == hash_folder(tmp_path / "whole")


def test_one_who_leaves_is_taken_out_by_one_pass_of_its_own(base, four, tmp_path):
    without = [four[0], four[1], four[3]]
    expected = mean_of(tmp_path / "fresh", base, without, CALIBRATION)
    mean_of(tmp_path / "left", base, four, CALIBRATION)
    passes = count_passes(base.model)
    leaver = four[2].adapter
    assert subtract_expert(tmp_path / "left", base, leaver, CALIBRATION)
    assert len(passes) == 3
    assert torch.equal(mean_of(tmp_path / "left", base, without, CALIBRATION), expected)
    assert not subtract_expert(tmp_path / "left", base, leaver, CALIBRATION)
    assert len(passes) == 3
    prune(tmp_path / "left", base, without)
    assert hash_folder(tmp_path / "left") == hash_folder(tmp_path / "fresh")


def prune(folder, base, experts):
    return prune_bank(
        folder,
        base=base.weights,
        adapters=[expert.adapter.hash for expert in experts if expert.adapter],
        blocks=[part.fingerprint for part in CALIBRATION],
        batch=choose_batch(CALIBRATION[0].block_size),
        frozen_depth=0,
    )


def test_pruning_keeps_what_is_needed(base, experts, tmp_path):
    bank = build_calibration_bank(tmp_path, base, experts, CALIBRATION, readings=ALL)
    del bank
    before = hash_folder(tmp_path)
    assert prune(tmp_path, base, experts) == 0
    assert hash_folder(tmp_path) == before
    assert prune(tmp_path, base, experts[:2]) > 0
    passes = count_passes(base.model)
    build_calibration_bank(tmp_path, base, experts[:2], CALIBRATION)
    assert not passes
    build_calibration_bank(tmp_path, base, experts, CALIBRATION)
    assert len(passes) == 3


def test_the_last_one_out_leaves_no_total(base, experts, tmp_path):
    mean_of(tmp_path, base, experts[1:2], CALIBRATION)
    passes = count_passes(base.model)
    assert subtract_expert(tmp_path, base, experts[1].adapter, CALIBRATION)
    assert not list(tmp_path.glob("total-*")) and not passes


def test_the_same_blocks_and_the_same_adapter_twice_count_twice(base, experts, tmp_path):
    """Two contributors may send the same text, and the same adapter."""
    twice = [*experts, Expert("copy", experts[2].adapter)]
    blocks = [CALIBRATION[0], CALIBRATION[1], CALIBRATION[0]]
    passes = count_passes(base.model)
    bank = build_calibration_bank(tmp_path, base, twice, blocks, readings=ALL)
    view = bank.view(slice(0, bank.num_blocks))
    torch.testing.assert_close(view.mean_hidden, view.experts_hidden.mean(2))
    assert torch.equal(view.mean_hidden[:5], view.mean_hidden[8:])
    # The copy runs once more, to be added once more; no blocks are run for their second sender.
    assert len(passes) == (3 + 1) * 2


def test_half_a_total_is_never_read(base, experts, tmp_path):
    expected = mean_of(tmp_path / "whole", base, experts, CALIBRATION)

    def stop(done, total, **fields):
        if done == 2 and fields.get("expert") == "base":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_calibration_bank(
            tmp_path / "halted", base, experts, CALIBRATION, batch=2,
            readings=frozenset({"mean_hidden"}), progress=stop,
        )  # fmt: skip
    next((tmp_path / "halted").glob("total-*.json")).write_text("{")
    assert torch.equal(mean_of(tmp_path / "halted", base, experts, CALIBRATION), expected)


def build_deep(model, experts, folder, **more):
    blocks, readings = CALIBRATION, frozenset({"evidence"})
    return build_calibration_bank(
        folder, make_base(model), experts, blocks, readings=readings, batch=4, **more
    )


def test_frozen_blocks_run_once_for_all_experts_and_change_no_bit(tiny_model, tmp_path):
    """Of three experts and a frozen block, only the base's pass runs that block."""
    model = tiny_model("llama")
    experts = [
        Expert("base", None),
        *(Expert(f"e{i}", build_random_adapter(model, seed=i, frozen_depth=1)) for i in (1, 2)),
    ]
    whole = build_deep(model, experts, tmp_path / "whole")
    runs = {0: [], 1: []}
    for depth, block in enumerate(model.model.layers[:2]):
        block.self_attn.register_forward_hook(
            lambda module, inputs, found, depth=depth: runs[depth].append(found[0].shape)
        )
    bank = build_deep(model, experts, tmp_path / "deep", frozen_depth=1)
    assert torch.equal(bank.logprob, whole.logprob)
    batches = 2 + 1 + 1  # of 5, 3 and 4 blocks
    full = [shape for shape in runs[0] if shape[1] == 12]
    assert len(full) == batches and len([s for s in runs[1] if s[1] == 12]) == 3 * batches
    # A newcomer's pass begins after the frozen block, too.
    runs[0].clear()
    newcomer = Expert("e3", build_random_adapter(model, seed=3, frozen_depth=1))
    build_deep(model, [*experts, newcomer], tmp_path / "deep", frozen_depth=1)
    assert not [shape for shape in runs[0] if shape[1] == 12]


def test_an_adapter_that_changes_a_frozen_block_is_run_whole(tiny_model, tmp_path):
    model = tiny_model("llama")
    experts = [Expert("base", None), Expert("e1", build_random_adapter(model, seed=1))]
    whole = build_deep(model, experts, tmp_path / "whole")
    bank = build_deep(model, experts, tmp_path / "deep", frozen_depth=1)
    assert torch.equal(bank.logprob, whole.logprob)
