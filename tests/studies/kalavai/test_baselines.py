"""Baselines that are trained for studies: joint, wider, and the base continued whole."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from molora_studies.framework.actions import open_base, open_corpus
from molora_studies.framework.substrate import (
    BaseSettings,
    FusionSettings,
    Member,
    SpecialistSettings,
    plan_base,
    plan_corpus,
    plan_fusion,
    plan_specialist,
)
from molora_studies.kalavai.baselines import (
    count_parameters,
    find_width,
    plan_joint,
    plan_whole,
    plan_wider,
)
from molora_studies.kalavai.joint import JointModel
from safetensors.torch import load_file
from study_tasks import DOMAINS, Run, running

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.files import load_adapter
from molora_fed.errors import ConfigError
from molora_fed.models.forward import compute_block_losses
from molora_fed.testing.models import build_random_adapter
from molora_fed.types import Split

SETTINGS = BaseSettings(hidden=32, layers=2, heads=2, vocab_size=290, steps=20, domains=DOMAINS)
BASE = plan_base(SETTINGS)
CORPORA = [plan_corpus(BASE, domain) for domain in DOMAINS]
MEMBERS = [
    Member(domain, plan_specialist(BASE, corpus, SpecialistSettings(steps=30)), corpus)
    for domain, corpus in zip(DOMAINS, CORPORA, strict=True)
]
HELD_OUT = 10


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with running(tmp_path_factory.mktemp("tasks")) as run_task:
        yield run_task


@pytest.fixture
def joint(tiny_model):
    base = tiny_model()
    experts = [copy.deepcopy(base), copy.deepcopy(base)]
    for seed, expert in enumerate(experts):
        with applied(base, build_random_adapter(base, seed=seed)) as changed:
            expert.load_state_dict(changed.state_dict())
    return JointModel(base, experts, end_of_text=0, router_scale=2.0)


def tokens_of(model: Any, seed: int) -> torch.Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (3, 12), generator=generator)


def test_a_joint_model_starts_as_the_bayesian_mixture(joint):
    tokens = tokens_of(joint, 1).clamp(min=1)  # no document ends
    whole = torch.stack(
        [compute_block_losses(m, tokens).sum(dim=1) for m in (joint.base, *joint.experts)]
    )
    expected = -(torch.logsumexp(-whole, dim=0) - torch.log(torch.tensor(3.0)))
    assert torch.allclose(compute_block_losses(joint, tokens).sum(dim=1), expected, atol=1e-3)


def test_a_joint_models_predictions_know_nothing_of_the_future(joint):
    torch.nn.init.normal_(joint.router, generator=torch.Generator().manual_seed(3))
    tokens = tokens_of(joint, 2)
    changed = tokens.clone()
    changed[:, 7:] = tokens_of(joint, 3)[:, 7:]
    with torch.no_grad():
        one, other = (joint(ids).logits for ids in (tokens, changed))
    assert torch.equal(one[:, :7], other[:, :7])
    assert not torch.allclose(one[:, 7:], other[:, 7:])
    assert torch.allclose(one.exp().sum(dim=-1), torch.ones(3, 12), atol=1e-5)


def test_a_joint_models_gates_forget_at_document_ends(joint):
    torch.nn.init.normal_(joint.router, generator=torch.Generator().manual_seed(3))
    hidden = torch.randn(1, 6, joint.router.shape[1], generator=torch.Generator().manual_seed(4))
    tokens = torch.tensor([[5, 6, 0, 7, 8, 9]])
    logprob = -torch.rand(1, 6, 3, generator=torch.Generator().manual_seed(5))
    one = joint.gates(hidden, logprob, tokens)
    hidden[:, :3] += 1.0
    logprob[:, :3, 1] -= 5.0
    other = joint.gates(hidden, logprob, tokens)
    assert torch.allclose(one[:, 3:], other[:, 3:], atol=1e-6)
    assert not torch.allclose(one[:, :3], other[:, :3], atol=1e-2)


def test_joint_training_improves_the_mixture_and_leaves_the_base(run: Run) -> None:
    task = plan_joint(BASE, MEMBERS, steps=24, seed=1, held_out=HELD_OUT)
    before = open_base(run(BASE)).weights
    done = run(task)
    assert done.result["loss"] < done.result["initial_loss"]
    assert done.result["expert_steps"] == 48
    assert open_base(run(BASE)).weights == before
    assert not list(done.folder.glob("checkpoint*"))  # as large as all experts together
    base = open_base(run(BASE))
    starts = []
    for member in MEMBERS:
        adapter = load_adapter(run(member.adapter).folder / "adapter")
        with applied(base.model, adapter) as model:
            own = open_corpus(run(member.corpus)).blocks[Split.VALIDATION].take(32).tokens
            starts.append(float(compute_block_losses(model, own).mean()))
    assert done.result["initial_loss"] < sum(starts) / 2 + 0.5  # it starts from the specialists


def test_the_base_continued_whole_gets_better(run: Run) -> None:
    done = run(plan_whole(BASE, CORPORA, steps=24, seed=1, held_out=HELD_OUT))
    assert done.result["loss"] < done.result["initial_loss"]
    assert set(done.result["losses"]) == set(DOMAINS)


def test_all_are_measured_on_the_blocks_of_the_fusion(run: Run) -> None:
    width = find_width(SETTINGS, len(DOMAINS))
    wide = plan_base(SETTINGS.model_copy(update={"hidden": width, "steps": 3}))
    baselines = {
        "wider": plan_wider(BASE, wide, CORPORA, steps=6, seed=1, held_out=HELD_OUT),
        "joint": plan_joint(BASE, MEMBERS, steps=24, seed=1, held_out=HELD_OUT),
        "base_continued": plan_whole(BASE, CORPORA, steps=24, seed=1, held_out=HELD_OUT),
    }
    chosen = FusionSettings(
        calibration=8, held_out=HELD_OUT, merges=("average", "ties", "dare", "dare-ties")
    )
    done = run(plan_fusion("all", BASE, MEMBERS, chosen, baselines=baselines))
    losses = done.result["evaluation"]["losses"]
    for label, task in baselines.items():
        assert losses[label] == pytest.approx(run(task).result["losses"], abs=1e-6)
        kept = load_file(run(task).folder / "held_out.safetensors")
        assert {d: tuple(nll.shape) for d, nll in kept.items()} == dict.fromkeys(
            DOMAINS, (HELD_OUT, 127)
        )
    assert {"weight_average", "ties", "dare", "dare-ties"} < set(losses)
    assert run(baselines["wider"]).result["parameters"] == count_parameters(
        SETTINGS.model_copy(update={"hidden": wide.settings["hidden"]})
    )


def test_a_wide_base_of_another_tokenizer_is_refused(run: Run) -> None:
    other = plan_base(SETTINGS.model_copy(update={"vocab_size": 300, "steps": 2}))
    task = plan_wider(BASE, other, CORPORA, steps=2, seed=1, held_out=HELD_OUT)
    with pytest.raises(ConfigError, match="tokenizer"):
        run(task)


def test_parameters_are_counted_as_the_model_has_them(run: Run) -> None:
    assert run(BASE).result["parameters"] == count_parameters(SETTINGS)


@settings(deadline=None, max_examples=60)
@given(
    hidden=st.integers(1, 40).map(lambda n: 8 * n),
    layers=st.integers(1, 12),
    specialists=st.integers(1, 20),
)
def test_the_wider_base_has_as_many_parameters(hidden, layers, specialists):
    narrow = BaseSettings(hidden=hidden, layers=layers)
    width = find_width(narrow, specialists)
    assert width >= hidden and width % (2 * narrow.heads) == 0
    own = layers * (12 * hidden**2 + 9 * hidden)
    wanted = count_parameters(narrow) + specialists * own
    found, above, below = (
        count_parameters(narrow.model_copy(update={"hidden": width + change}))
        for change in (0, 8, -8)
    )
    assert abs(found - wanted) <= min(abs(above - wanted), abs(below - wanted))
