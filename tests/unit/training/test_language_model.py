"""The job of a language model: data, losses, what is kept, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from training_helpers import build_tokens

from molora_fed.corpus.batches import mix_domains, take_batch
from molora_fed.errors import TrainingError
from molora_fed.models import runtime
from molora_fed.models.head import find_head
from molora_fed.models.runtime import Placement
from molora_fed.storage.locks import lock_folder
from molora_fed.training import language_model as training
from molora_fed.training.language_model import TrainConfig, train
from molora_fed.training.loop import CHECKPOINT_NAME, METRICS_NAME

CONFIG = TrainConfig(
    steps=12, batch=4, learning_rate=1e-2, seed=5, threads=1, validate_every=4, evaluation_batch=8
)
TRAIN, VALIDATION = build_tokens(40, seed=1), build_tokens(8, seed=2)


class Stopped(Exception):
    pass


def run(model, folder, config=CONFIG, **more):
    model.requires_grad_(True)
    return train(model, list(model.parameters()), TRAIN, VALIDATION, config, folder, **more)


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def stop_at(step):
    def progress(done, total, **fields):
        if done >= step:
            raise Stopped

    return progress


def with_config(**changes):
    return TrainConfig(**{**vars(CONFIG), **changes})


def test_training_lowers_the_loss_and_reports_it(tiny_model, tmp_path):
    calls = []
    model = tiny_model()
    result = run(model, tmp_path, progress=lambda *a, **fields: calls.append((a, fields)))
    assert result.loss < result.initial_loss
    assert (result.steps, result.tokens, result.threads) == (12, 12 * 4 * 24, 1)
    assert result.dtype == "float32" and result.environment["torch"] == torch.__version__
    assert not model.training
    assert calls[-1][0] == (12, 12)
    assert set(calls[0][1]) == {"loss", "validation_loss", "tokens_per_second", "eta_seconds"}
    assert calls[-1][1]["eta_seconds"] == 0.0


def test_metrics_are_json_lines_with_every_validation(tiny_model, tmp_path):
    result = run(tiny_model(), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / METRICS_NAME).read_text().splitlines()]
    names = {"step", "loss", "validation_loss", "learning_rate", "tokens", "seconds"}
    assert all(set(row) == names for row in rows)
    validated = {row["step"]: row["validation_loss"] for row in rows if row["validation_loss"]}
    assert list(validated) == [0, 4, 8, 12]
    assert validated[0] == result.initial_loss
    assert min(validated.values()) == result.loss
    assert "seconds" not in result.to_record()


def test_same_seed_gives_the_same_bytes_and_another_seed_others(tiny_model, tmp_path):
    models = [tiny_model() for _ in range(3)]
    results = [
        run(model, tmp_path / str(index), with_config(seed=seed))
        for index, (model, seed) in enumerate(zip(models, (5, 5, 6), strict=True))
    ]
    assert_equal_weights(weights_of(models[0]), weights_of(models[1]))
    assert results[0].to_record() == results[1].to_record()
    assert results[0].loss != results[2].loss


@pytest.mark.parametrize("step", [1, 5, 8, 10])
def test_interrupted_run_ends_like_an_uninterrupted_one(tiny_model, tmp_path, step):
    whole, broken, resumed = tiny_model(), tiny_model(), tiny_model()
    expected = run(whole, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(broken, tmp_path / "broken", progress=stop_at(step))
    result = run(resumed, tmp_path / "broken")
    assert_equal_weights(weights_of(whole), weights_of(resumed))
    assert result.to_record() == expected.to_record()
    steps = [
        [json.loads(line)["step"] for line in (tmp_path / name / METRICS_NAME).open()]
        for name in ("whole", "broken")
    ]
    assert steps[0] == steps[1]


def test_resuming_a_finished_run_trains_no_more(tiny_model, tmp_path):
    first, second = tiny_model(), tiny_model()
    expected = run(first, tmp_path)
    result = run(second, tmp_path, progress=stop_at(0))
    assert result.to_record() == expected.to_record()
    assert_equal_weights(weights_of(first), weights_of(second))


def test_resuming_keeps_the_thread_count_it_began_with(tiny_model, tmp_path):
    before = torch.get_num_threads()
    whole, resumed = tiny_model(), tiny_model()
    run(whole, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tiny_model(), tmp_path / "broken", progress=stop_at(6))
    used = []
    result = run(
        resumed,
        tmp_path / "broken",
        with_config(threads=2),
        progress=lambda *a, **fields: used.append(torch.get_num_threads()),
    )
    assert result.threads == 1 and set(used) == {1}
    assert torch.get_num_threads() == before
    assert_equal_weights(weights_of(whole), weights_of(resumed))


def test_resuming_with_another_dtype_is_refused(tiny_model, tmp_path):
    with pytest.raises(Stopped):
        run(tiny_model(), tmp_path, progress=stop_at(6))
    with pytest.raises(TrainingError, match="dtype 'float32' instead of 'bfloat16'"):
        run(tiny_model().to(torch.bfloat16), tmp_path)


def test_resuming_with_other_versions_is_refused(tiny_model, tmp_path, monkeypatch):
    with pytest.raises(Stopped):
        run(tiny_model(), tmp_path, progress=stop_at(6))
    monkeypatch.setattr(runtime, "version", lambda name: "0.0.1")
    with pytest.raises(TrainingError, match=r"torch '.*' instead of '0.0.1'"):
        run(tiny_model(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "context", "named"),
    [
        ({"learning_rate": 1e-3}, None, "learning_rate"),
        ({"seed": 6}, None, "seed"),
        ({}, {"base": "b"}, "base 'a' instead of 'b'"),
    ],
)
def test_resuming_with_other_inputs_is_refused(tiny_model, tmp_path, changes, context, named):
    with pytest.raises(Stopped):
        run(tiny_model(), tmp_path, context={"base": "a"}, progress=stop_at(6))
    with pytest.raises(TrainingError, match=named):
        run(tiny_model(), tmp_path, with_config(**changes), context=context or {"base": "a"})


def test_resuming_with_other_blocks_is_refused(tiny_model, tmp_path):
    with pytest.raises(Stopped):
        run(tiny_model(), tmp_path, progress=stop_at(6))
    model = tiny_model().requires_grad_(True)
    with pytest.raises(TrainingError, match="blocks"):
        train(model, list(model.parameters()), TRAIN[1:], VALIDATION, CONFIG, tmp_path)


def test_truncated_checkpoint_is_a_one_line_error(tiny_model, tmp_path):
    with pytest.raises(Stopped):
        run(tiny_model(), tmp_path, progress=stop_at(6))
    path = tmp_path / CHECKPOINT_NAME
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TrainingError, match="expected a checkpoint of this program") as caught:
        run(tiny_model(), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_takes_one_training_at_a_time(tiny_model, tmp_path):
    with lock_folder(tmp_path), pytest.raises(TrainingError, match="one at work"):
        run(tiny_model(), tmp_path)


def test_left_over_of_a_killed_write_is_removed(tiny_model, tmp_path):
    left_over = tmp_path / ".checkpoint.safetensors.abc.tmp"
    left_over.write_bytes(b"half")
    run(tiny_model(), tmp_path)
    assert not left_over.exists()


def test_best_weights_are_kept_and_patience_stops(tiny_model, tmp_path):
    model = tiny_model()
    before = weights_of(model)
    # A rate this large only does harm, so that the start stays the best.
    result = run(model, tmp_path, with_config(learning_rate=1.0, patience=2))
    assert result.best_step == 0 and result.loss == result.initial_loss
    assert result.stopped_early and result.steps == 8
    assert_equal_weights(before, weights_of(model))


def test_only_the_given_parameters_change(tiny_model, tmp_path):
    model = tiny_model()
    before = weights_of(model)
    chosen = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
    parameter = dict(model.named_parameters())[chosen].requires_grad_(True)
    train(model, [parameter], TRAIN, VALIDATION, CONFIG, tmp_path)
    after = weights_of(model)
    assert {name for name in after if not torch.equal(before[name], after[name])} == {chosen}


def test_caller_keeps_its_random_numbers_and_settings(tiny_model, tmp_path):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    run(tiny_model(), tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.are_deterministic_algorithms_enabled()


def test_checkpoint_holds_no_code_and_no_wall_time(tiny_model, tmp_path):
    run(tiny_model(), tmp_path)
    with safe_open(tmp_path / CHECKPOINT_NAME, framework="pt") as file:
        state = json.loads(file.metadata()["state"])
    assert state["counters"]["step"] == 12
    assert "seconds" not in json.dumps(state)


@pytest.mark.parametrize(
    ("changes", "named"), [({"steps": 0}, "steps 0"), ({"learning_rate": -1.0}, "learning_rate")]
)
def test_unusable_settings_are_refused(tiny_model, tmp_path, changes, named):
    with pytest.raises(TrainingError, match=named):
        run(tiny_model(), tmp_path, with_config(**changes))


def test_no_blocks_or_parameters_are_refused_together(tiny_model, tmp_path):
    with pytest.raises(TrainingError, match=r"no parameters.*validation blocks of shape \(0, 24\)"):
        train(tiny_model(), [], TRAIN, VALIDATION[:0], CONFIG, tmp_path)


def test_loss_that_is_not_finite_stops(tiny_model, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight[0, 0] = math.nan
    with pytest.raises(TrainingError, match="finite validation loss, got nan"):
        run(model, tmp_path)


def test_learning_rate_warms_up_and_falls_to_zero():
    config = with_config(steps=100, warmup_fraction=0.1)
    rates = [training.compute_learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(1e-3) and rates[9] == pytest.approx(1e-2)
    assert rates[10] == pytest.approx(1e-2) and rates[100] == pytest.approx(0.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_every_block_is_seen_once_an_epoch():
    blocks = np.arange(10, dtype=np.int32)[:, None] * np.ones((1, 2), dtype=np.int32)
    seen = np.concatenate([take_batch(blocks, s, batch=4, seed=1)[:, 0] for s in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])


def test_domains_are_mixed_in_equal_numbers():
    domains = [np.full((n, 2), n, dtype=np.int32) for n in (3, 50)]
    domains[0] += np.arange(3, dtype=np.int32)[:, None] * 100
    mixed = mix_domains(domains, 19, seed=1)
    assert mixed.shape == (20, 2)
    assert (mixed[:, 0] == 50).sum() == 10
    counts = np.unique(mixed[mixed[:, 0] != 50][:, 0], return_counts=True)[1]
    assert counts.max() - counts.min() <= 1  # none a third time before all were twice


def test_a_step_in_parts_is_the_step_but_for_rounding(tiny_model, tmp_path):
    whole, parts = tiny_model(), tiny_model()
    one = run(whole, tmp_path / "whole")
    two = run(parts, tmp_path / "parts", with_config(accumulation=3))  # 2, 1 and 1 of 4 blocks
    assert two.loss == pytest.approx(one.loss, abs=1e-4)
    for name, value in weights_of(parts).items():  # AdamW takes whole steps along tiny gradients
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=0.1, atol=0.02)
    with pytest.raises(TrainingError, match="accumulation 0"):
        run(tiny_model(), tmp_path / "none", with_config(accumulation=0))


def test_activations_made_again_change_no_byte(tiny_model, tmp_path):
    kept, again = tiny_model(), tiny_model()
    run(kept, tmp_path / "kept")
    run(again, tmp_path / "again", with_config(checkpointing=True))
    assert_equal_weights(weights_of(kept), weights_of(again))
    assert not again.is_activation_checkpointing


def test_activations_may_be_kept_or_made_again_from_one_start_to_the_next(tiny_model, tmp_path):
    with pytest.raises(Stopped):
        run(tiny_model(), tmp_path, progress=stop_at(6))
    whole, resumed = tiny_model(), tiny_model()
    run(whole, tmp_path / "whole")
    run(resumed, tmp_path, with_config(checkpointing=True))
    assert_equal_weights(weights_of(whole), weights_of(resumed))


def test_in_bfloat16_what_is_trained_stays_float32(tiny_model, tmp_path):
    model = tiny_model().to(torch.bfloat16)
    trained = list(model.gpt_neox.layers.requires_grad_(True).parameters())
    result = train(model, trained, TRAIN, VALIDATION, CONFIG, tmp_path)
    full = train(
        (other := tiny_model()), list(other.gpt_neox.layers.requires_grad_(True).parameters()),
        TRAIN, VALIDATION, CONFIG, tmp_path / "full",
    )  # fmt: skip
    assert result.dtype == "bfloat16" and full.dtype == "float32"
    assert all(parameter.dtype is torch.float32 for parameter in trained)
    assert model.get_input_embeddings().weight.dtype is torch.bfloat16
    assert result.loss < result.initial_loss and result.loss == pytest.approx(full.loss, abs=0.02)
    assert result.initial_loss == pytest.approx(full.initial_loss, abs=0.003)


TARGETS = np.random.default_rng(3).random(TRAIN.shape) < 0.3
VALIDATION_TARGETS = np.random.default_rng(4).random(VALIDATION.shape) < 0.3


def read_gradients(model, targets):
    """Whether a token's prediction has a gradient at step 2, (B, T - 1); and the targets there."""
    found = []

    def keep(module, args, output):
        # A state is read by the head alone, so that only its own prediction moves it.
        output.last_hidden_state.register_hook(lambda g: found.append(g.abs().sum(-1) > 0))

    head = find_head(model)
    with model.get_decoder().register_forward_hook(keep):
        (loss,) = training._BlockLoss(model, head, TRAIN, targets, CONFIG, Placement())(2)
    loss.backward()
    return found[0].numpy(), float(loss.detach())


def test_only_targets_have_a_gradient(tiny_model):
    gradients, loss = read_gradients(tiny_model().requires_grad_(True), TARGETS)
    expected = take_batch(TARGETS, 2, batch=CONFIG.batch, seed=CONFIG.seed)[:, 1:]
    assert np.array_equal(gradients, expected)
    rows = take_batch(TRAIN, 2, batch=CONFIG.batch, seed=CONFIG.seed)
    losses = training.compute_block_losses(tiny_model(), rows)
    assert loss == pytest.approx(float(losses[torch.from_numpy(expected)].mean()), rel=1e-5)


def test_all_targets_are_as_none(tiny_model):
    _, every = read_gradients(tiny_model().requires_grad_(True), np.ones_like(TARGETS))
    _, none = read_gradients(tiny_model().requires_grad_(True), None)
    assert every == pytest.approx(none, rel=1e-6)


def test_a_batch_without_a_target_changes_nothing(tiny_model):
    gradients, loss = read_gradients(tiny_model().requires_grad_(True), np.zeros_like(TARGETS))
    assert (loss, gradients.any()) == (0, False)


def test_training_and_validation_honour_targets(tiny_model, tmp_path):
    targets = {"train_targets": TARGETS, "validation_targets": VALIDATION_TARGETS}
    model = tiny_model()
    losses = training.compute_block_losses(model, VALIDATION)
    expected = float(losses[torch.from_numpy(VALIDATION_TARGETS[:, 1:])].mean())
    result = run(model, tmp_path / "a", **targets)
    assert result.initial_loss == pytest.approx(expected, rel=1e-6)
    assert result.loss < result.initial_loss
    with pytest.raises(Stopped):
        run(tiny_model(), tmp_path / "b", progress=stop_at(5), **targets)
    with pytest.raises(TrainingError, match="blocks"):
        run(tiny_model(), tmp_path / "b")  # a checkpoint of another loss
    resumed = tiny_model()
    run(resumed, tmp_path / "b", **targets)
    assert_equal_weights(weights_of(resumed), weights_of(model))


@pytest.mark.parametrize("targets", [np.zeros_like(TARGETS), TARGETS[1:]])
def test_targets_that_do_not_fit_are_refused(tiny_model, tmp_path, targets):
    with pytest.raises(TrainingError, match="training blocks in which no token counts"):
        run(tiny_model(), tmp_path, train_targets=targets)
