import json
import signal

import pytest
import torch
from forking_helpers import run_forked
from peft import PeftModel
from training_helpers import TRAINING, build_blocks, run_until_killed, train_counting

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.files import load_adapter
from molora_fed.charter import AdapterRules, TrainingRules
from molora_fed.errors import AdapterError, TrainingError, UnknownNameError
from molora_fed.models.base import load_base
from molora_fed.models.forward import compute_block_losses
from molora_fed.training.adapter_job import load_specialist
from molora_fed.training.loop import CHECKPOINT_NAME
from molora_fed.types import ADAPTER_FILES, Split

KINDS = ("lora", "svd", "delta")
SHORT = TrainingRules(rank=4, steps=6, batch=4, learning_rate=1e-2, validate_every=3)


@pytest.fixture
def base(tiny_checkpoint):
    return load_base(tiny_checkpoint("gpt_neox"))


def bytes_of(folder):
    return {name: (folder / "adapter" / name).read_bytes() for name in ADAPTER_FILES}


def logits_of(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_specialist_is_better_than_the_base_where_it_trained(base, tmp_path, kind):
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    specialist = train_counting(base, tmp_path, kind=kind)
    assert specialist.loss < specialist.base_loss
    assert specialist.kind == kind and specialist.domain == "counting"
    after = base.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not (tmp_path / CHECKPOINT_NAME).exists()
    assert {p.name for p in tmp_path.iterdir()} == {
        ".lock",
        "adapter",
        "metrics.jsonl",
        "record.json",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_is_trained_above_the_frozen_depth(
    tiny_checkpoint, architecture, tmp_path, kind
):
    base = load_base(tiny_checkpoint(architecture))
    rules = AdapterRules(frozen_depth=1)
    specialist = train_counting(base, tmp_path, kind=kind, rules=rules, training=SHORT)
    adapter = load_adapter(specialist.adapter_folder, rules=rules)
    assert specialist.loss < specialist.base_loss
    assert adapter.frozen_depth == 1
    assert adapter.updates and not any(".0." in name for name in adapter.updates)


# PEFT 0.21 asks transformers 5 for an attribute by its old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("kind", ["lora", "svd"])
def test_low_rank_kinds_load_with_plain_peft(tiny_checkpoint, architecture, tmp_path, tokens, kind):
    base = load_base(tiny_checkpoint(architecture))
    specialist = train_counting(base, tmp_path, kind=kind, training=SHORT)
    adapter = load_adapter(specialist.adapter_folder)
    with applied(base.model, adapter):
        ours = logits_of(base.model, tokens)
    plain = load_base(tiny_checkpoint(architecture)).model
    theirs = logits_of(
        PeftModel.from_pretrained(plain, str(specialist.adapter_folder)).eval(), tokens
    )
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)


def test_record_tells_what_decides_the_bytes(base, tmp_path):
    record = train_counting(base, tmp_path).record
    assert record["threads"] == 1 and record["dtype"] == "float32"
    assert record["environment"]["torch"] == torch.__version__
    assert record["base_weights"] == base.weights
    assert record["tokens"] == record["steps"] * TRAINING.batch * 24
    assert record["settings"]["seed"] == 3
    assert json.loads((tmp_path / "record.json").read_text()) == record
    assert not any("second" in name for name in record)


def test_same_training_gives_the_same_bytes_and_record(base, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    records = [train_counting(base, folder, kind="lora").record for folder in folders]
    assert bytes_of(folders[0]) == bytes_of(folders[1])
    assert records[0] == records[1]


def test_finished_training_is_loaded_not_repeated(base, tmp_path):
    calls = []
    first = train_counting(base, tmp_path)
    again = train_counting(base, tmp_path, threads=2, progress=lambda *a, **f: calls.append(a))
    assert again.record == first.record == load_specialist(tmp_path).record
    assert calls == []


def test_options_of_the_kind_decide_what_is_trained_and_shipped(base, tmp_path):
    training = TRAINING.model_copy(
        update={"kind": "svd", "options": {"precision": "int4", "targets": "attention"}}
    )
    small = train_counting(base, tmp_path / "small", training=training)
    plain = train_counting(base, tmp_path / "plain")
    adapter = load_adapter(small.adapter_folder)
    assert all(".attention." in name for name in adapter.updates)
    assert small.record["options"] == training.options and "options" not in plain.record
    assert small.record["adapter_bytes"] < plain.record["adapter_bytes"]
    with applied(base.model, adapter) as model:  # The stated loss is of what is shipped.
        blocks = build_blocks(Split.VALIDATION, 8, seed=2)
        losses = compute_block_losses(model, blocks.tokens, batch=16)
    assert small.loss == pytest.approx(float(losses.double().mean()), abs=1e-12)
    with pytest.raises(TrainingError, match="differs in options"):
        train_counting(
            base,
            tmp_path / "small",
            training=training.model_copy(update={"options": {"precision": "int8"}}),
        )


def test_options_of_the_charter_s_kind_are_not_another_kind_s(base, tmp_path):
    training = TRAINING.model_copy(update={"kind": "svd", "options": {"budget_bytes": 9000}})
    assert "options" not in train_counting(base, tmp_path, kind="delta", training=training).record


def test_unknown_options_are_refused_before_training(base, tmp_path):
    training = TRAINING.model_copy(update={"kind": "svd", "options": {"bits": 4}})
    with pytest.raises(AdapterError, match=r"options of kind 'svd'.*bits"):
        train_counting(base, tmp_path, training=training)
    assert not (tmp_path / CHECKPOINT_NAME).exists()


def test_folder_of_another_training_is_refused(base, tmp_path):
    train_counting(base, tmp_path, kind="svd")
    with pytest.raises(TrainingError, match=r"differs in kind.*Choose another folder"):
        train_counting(base, tmp_path, kind="lora")


def test_adapter_changed_after_training_is_noticed(base, tmp_path):
    train_counting(base, tmp_path)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(TrainingError, match="of its record"):
        train_counting(base, tmp_path)


def test_kind_the_charter_does_not_accept_is_refused(base, tmp_path):
    with pytest.raises(TrainingError, match="expected one of lora, svd, got 'delta'"):
        train_counting(base, tmp_path, kind="delta", rules=AdapterRules(kinds=("lora", "svd")))


def test_kind_nobody_registers_is_refused(base, tmp_path):
    with pytest.raises(UnknownNameError, match="Did you mean 'lora'"):
        train_counting(base, tmp_path, kind="lorra", rules=AdapterRules(kinds=("lorra",)))


def test_rank_above_the_charters_is_refused_before_training(base, tmp_path):
    with pytest.raises(AdapterError, match="rank from 1 to 2"):
        train_counting(base, tmp_path, kind="svd", rules=AdapterRules(max_rank=2))
    assert list(tmp_path.iterdir()) == []


def test_no_record_is_a_one_line_error(tmp_path):
    with pytest.raises(TrainingError, match="expected a finished training"):
        load_specialist(tmp_path)


# Each process is killed at its own moment and leaves the next where it came to: before anything
# is written; inside the first metrics file; inside the first checkpoint; between two; after
# one took its place but before its folder is on disk; in the adapter's files; as the folder of
# the adapter is renamed; and inside the record.
MOMENTS = [
    ("report", 1),
    ("fsync", 1),
    ("fsync", 3),
    ("fsync", 4),
    ("report", 2),
    ("fsync", 7),
    ("fsync", 9),
    ("fsync", 2),
    ("fsync", 6),
    ("fsync", 9),
    ("fsync", 11),
    ("fsync", 12),
]


@pytest.mark.parametrize(
    ("kind", "moments"), [("svd", MOMENTS), ("lora", MOMENTS[2::4]), ("delta", MOMENTS[3::4])]
)
def test_killed_anywhere_and_restarted_gives_the_same_bytes(
    tiny_checkpoint, tmp_path, kind, moments
):
    checkpoint = tiny_checkpoint("gpt_neox")
    whole = train_counting(load_base(checkpoint), tmp_path / "whole", kind=kind)
    broken = tmp_path / "broken"

    def start(where, count):
        arguments = (str(checkpoint), str(broken), kind, where, count)
        return run_forked(tmp_path / "said", run_until_killed, *arguments).code

    codes = [start(where, count) for where, count in moments]
    assert set(codes) == {-signal.SIGKILL}
    assert not (broken / "record.json").exists()
    assert start("never", 0) == 0
    assert bytes_of(broken) == bytes_of(tmp_path / "whole")
    assert load_specialist(broken).record == whole.record
    names = {"adapter", "metrics.jsonl", "record.json", ".lock"}
    assert {path.name for path in broken.iterdir()} == names
