"""lm-evaluation-harness, unchanged, on a fused model and on each of its specialists."""

import math

import pytest
import torch
from fused_helpers import ALL_COLUMNS, build_fused
from harness_tasks import write_task

from molora_fed.inference.fused_build import build_causal_lm
from molora_fed.models.base import load_base

pytest.importorskip("lm_eval", reason="needs the extra molora-fed[eval]")
pytestmark = pytest.mark.filterwarnings("ignore")

CHOICES = [
    {"context": "def main(", "choices": ["args):", "?", " of the"], "answer": 0},
    {"context": "The cell", "choices": [" divides.", " x = 1", " {}"], "answer": 1},
    {"context": "", "choices": ["# title", "int", "return"], "answer": 2},
]
TEXTS = ["def main(args):\n    return 1\n", "The cell divides.", "x"]


@pytest.fixture(scope="module")
def lm(tiny_checkpoint):
    return build_causal_lm(build_fused(load_base(tiny_checkpoint()), columns=ALL_COLUMNS))


@pytest.fixture(scope="module")
def evaluate(lm, tmp_path_factory):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "choose", "choice", CHOICES)
    write_task(folder, "read", "rolling", [{"text": text} for text in TEXTS])
    write_task(folder, "write", "until", [{"context": "def ", "text": "main"}])
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    model = HFLM(pretrained=lm, tokenizer=lm.base.tokenizer, batch_size=2)
    tasks = ["choose", "read", "write"]

    def run():
        result = simple_evaluate(
            model, tasks=tasks, task_manager=manager, log_samples=True, bootstrap_iters=0
        )
        return result["samples"], result["results"]

    return run


def score(lm, context, text):
    """Log-probability of a text after another, nats; after the end of a text if that is empty."""
    tokenizer = lm.base.tokenizer
    before = tokenizer.encode(context) or [tokenizer.eos_token_id]
    tokens = torch.tensor([before + tokenizer.encode(text)])
    log_probs = lm(input_ids=tokens).logits[:, :-1].gather(-1, tokens[:, 1:, None])
    return float(log_probs[0, len(before) - 1 :].sum())


def check(lm, evaluate):
    samples, results = evaluate()
    for sample in samples["choose"]:
        doc = sample["doc"]
        found = [answer[0][0] for answer in sample["resps"]]
        expected = [score(lm, doc["context"], choice) for choice in doc["choices"]]
        assert found == pytest.approx(expected, abs=1e-3)
    total = 0.0
    for sample in samples["read"]:
        expected = score(lm, "", sample["doc"]["text"])
        assert sample["resps"][0][0] == pytest.approx(expected, abs=1e-3)
        total += expected
    count = sum(len(text.encode()) for text in TEXTS)
    found = results["read"]["byte_perplexity,none"]
    assert found == pytest.approx(math.exp(-total / count), rel=1e-4)
    prompt = torch.tensor([lm.base.tokenizer.encode("def ")])
    mask = torch.ones_like(prompt)
    written = lm.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False)
    expected = lm.base.tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)
    assert samples["write"][0]["resps"][0][0] == expected
    return total


def test_it_evaluates_the_model_and_every_specialist_in_one_load(lm, evaluate):
    totals = {"fused": check(lm, evaluate)}
    for name in lm.expert_names:
        with lm.alone(name):
            totals[name] = check(lm, evaluate)
    assert len({round(total, 3) for total in totals.values()}) == 4
