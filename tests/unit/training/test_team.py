"""What the processes of a launched training share, and launchers that fail."""

import json

import numpy as np
import pytest
import torch
from training_helpers import TRAINING, build_tokens, train_counting

from molora_fed.errors import ConfigError, TrainingError
from molora_fed.models.base import load_base
from molora_fed.models.head import find_head
from molora_fed.models.runtime import Placement
from molora_fed.storage.settings import check_options
from molora_fed.training.adapter_job import load_specialist
from molora_fed.training.choices import TrainingChoices
from molora_fed.training.language_model import TrainConfig, _BlockLoss
from molora_fed.training.team import ALONE, Team

CONFIG = TrainConfig(
    steps=4, batch=5, learning_rate=1e-2, seed=1, threads=1, validate_every=2, accumulation=2
)


@pytest.fixture
def base(tiny_checkpoint):
    return load_base(tiny_checkpoint("gpt_neox"))


@pytest.mark.parametrize("some_count", [False, True])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_shares_of_a_batch_add_up_to_the_whole(base, size, some_count):
    blocks = build_tokens(9, seed=4)
    targets = np.random.default_rng(5).random(blocks.shape) < 0.3 if some_count else None
    model = base.model.requires_grad_()
    weight = model.get_input_embeddings().weight

    def measure(team):
        loss = _BlockLoss(
            model, find_head(model), blocks, targets, CONFIG, Placement(), team
        )  # fmt: skip
        weight.grad = None
        total = 0.0
        for part in loss(2):
            part.backward()
            total += float(part.detach())
        return total, weight.grad

    whole, shares = measure(ALONE), [measure(Team(rank, size)) for rank in range(size)]
    assert sum(loss for loss, _ in shares) == pytest.approx(whole[0], abs=1e-5)
    torch.testing.assert_close(sum(g for _, g in shares), whole[1], atol=1e-6, rtol=1e-4)


def test_every_row_is_in_one_share():
    rows = np.arange(7)
    shares = [Team(rank, 3).take_share(rows) for rank in range(3)]
    assert np.concatenate(shares).tolist() == rows.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert ALONE.take_share(rows) is not None and not ALONE.describe()


@pytest.mark.parametrize("launcher", ["no-such-launcher --now", "/no/such/launcher"])
def test_a_launcher_that_is_not_there_is_refused_before_any_work(base, tmp_path, launcher):
    with pytest.raises(ConfigError, match="expected a program of this machine"):
        train_counting(base, tmp_path / "out", choices=TrainingChoices(launcher=launcher))
    assert not (tmp_path / "out").exists()


def test_a_launcher_that_cannot_be_split_is_an_option_out_of_range():
    with pytest.raises(ConfigError, match="launcher: Value error, No closing quotation"):
        check_options(
            TrainingChoices, {"launcher": "torchrun 'a"}, what="No", error=ConfigError, fix="Fix."
        )


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        ("false", "got exit code 1. See"),
        ("sh -c 'echo no port is free >&2; exit 3'", "got exit code 3: no port is free. See"),
        ("sh -c 'kill -9 $$'", "got exit code -9. See"),
    ],
)
def test_a_launcher_that_fails_is_one_line(base, tmp_path, launcher, said):
    with pytest.raises(TrainingError) as error:
        train_counting(base, tmp_path, choices=TrainingChoices(launcher=launcher))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "launch" / "launcher.log").exists()


CRASH = r"""cd $(dirname $3)
printf "a warning\n\nterminate called after throwing an instance of gloo::EnforceNotMet\n" \
    > process-1.log
printf "  what():  \033[1mtoo short\nFatal Python error: Aborted\n\nThread 0x1:\n  <no frame>\n" \
    >> process-1.log
echo "Lowering the number of threads" > process-0.log
echo '{"type": "RuntimeError", "message": "Connection closed by peer"}' > error-0.json
echo "Signal 6 received"
exit 1
"""


def test_the_last_words_of_a_process_that_crashed_are_in_the_error(base, tmp_path):
    (tmp_path / "crash.sh").write_text(CRASH)
    choices = TrainingChoices(launcher=f"sh {tmp_path / 'crash.sh'}")
    with pytest.raises(TrainingError) as error:
        train_counting(base, tmp_path, choices=choices)
    assert (
        "got exit code 1: process 1: terminate called after throwing an instance of "
        "gloo::EnforceNotMet; what(): \N{REPLACEMENT CHARACTER}[1mtoo short; "
        f"Fatal Python error: Aborted. See '{tmp_path / 'launch'}'." in str(error.value)
    )
    assert "\n" not in str(error.value)


def test_a_launcher_that_starts_nothing_is_said(base, tmp_path):
    with pytest.raises(TrainingError, match="Cannot read specialist"):
        train_counting(base, tmp_path, choices=TrainingChoices(launcher="true"))


def test_what_was_trained_by_several_processes_is_loaded_by_one(base, tmp_path):
    first = train_counting(base, tmp_path)
    kept = tmp_path / "record.json"
    kept.write_text(json.dumps({**first.record, "processes": 2}))
    choices = TrainingChoices(launcher="false")  # never started
    assert train_counting(base, tmp_path, choices=choices).record["processes"] == 2
    assert load_specialist(tmp_path).record == train_counting(base, tmp_path).record


def test_the_launcher_is_no_part_of_what_is_trained():
    choices = TrainingChoices(launcher="accelerate launch", batch=3)
    assert choices.describe() == {"batch": 3}
    assert choices.over(TRAINING) == TRAINING.model_copy(update={"batch": 3})
    assert TrainingChoices().split_launcher() == []
