"""Study sandbox: the teacher is what it says, methods are compared fairly, verdicts follow."""

from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from molora_studies.evolution.sandbox import SandboxOptions, SandboxStudy, search_channels
from molora_studies.evolution.teacher import (
    Teacher,
    compute_gates,
    count_parameters,
    measure_loss,
)
from molora_studies.framework.contract import TaskContext

OPTIONS = SandboxOptions(seeds=(0, 1, 2), alignments=(0.0, 1.0), noises=(0.0, 4.0))


@pytest.mark.parametrize("alignment", [0.0, 0.3, 1.0])
def test_alignment_is_the_cosine_between_an_adapter_and_its_task(alignment):
    teacher = Teacher(alignment, 3)
    for task, adapter in zip(teacher.tasks, teacher.adapters, strict=True):
        size = (task**2).sum() ** 0.5
        assert (adapter**2).sum() ** 0.5 == pytest.approx(size)
        assert (task * adapter).sum() / size**2 == pytest.approx(alignment, abs=1e-12)
    assert (teacher.tasks[0] * teacher.adapters[1]).sum() == pytest.approx(0, abs=1e-12)


def test_no_gate_leaves_the_base_and_its_noise():
    closed = torch.full((count_parameters(),), 0.0)
    closed.view(4, -1)[:, -1] = -50.0  # biases
    for noise in (0.0, 2.0):
        sample = Teacher(1.0, 0).draw(20_000, noise, 0)
        assert float(measure_loss(closed, sample, "soft")) == pytest.approx(1 + noise**2, rel=0.1)


def test_hard_gates_are_zero_or_one_and_learn_by_the_soft_gradient():
    random = torch.Generator().manual_seed(0)
    parameters = torch.randn(count_parameters(), generator=random, requires_grad=True)
    cues = torch.randn(5, 8, generator=random)
    hard = compute_gates(parameters, cues, "hard")
    assert set(hard.detach().round(decimals=6).unique().tolist()) <= {0.0, 1.0}
    slopes = [
        torch.autograd.grad(compute_gates(parameters, cues, channel).sum(), parameters)[0]
        for channel in ("soft", "hard")
    ]
    assert torch.equal(*slopes)


def search(alignment: float, tmp_path: Any) -> dict[str, Any]:
    cell = SandboxStudy.plan(
        SandboxOptions(
            seeds=(5,), alignments=(alignment, 0.5), noises=(0.0,), evaluations=384, examples=1280
        )
    )[0]
    return search_channels(cell.task.settings, TaskContext(tmp_path, (), 1, tmp_path))


def test_search_finds_what_aligned_adapters_offer_and_repeats(tmp_path):
    found = search(1.0, tmp_path)
    assert found == search(1.0, tmp_path)
    assert found["soft"]["gradient"] < 0.5 * found["soft"]["base"]
    assert found["soft"]["evolution"] < found["soft"]["start"]
    assert found["hard"]["base"] == found["soft"]["base"]


def make_results(
    gradient: dict[float, float], evolution: dict[float, float]
) -> dict[str, dict[str, Any]]:
    results = {}
    for cell in SandboxStudy.plan(OPTIONS):
        alignment, wiggle = cell.labels["alignment"], 1e-4 * cell.labels["seed"]
        losses = {
            "base": 1.0,
            "gradient": gradient[alignment],
            "gradient_same_cost": gradient[alignment] + 0.02,
            "evolution": evolution[alignment] + wiggle,
            "refined": gradient[alignment] + wiggle,
        }
        results[cell.name] = {"soft": losses, "hard": losses}
    return results


def test_search_that_helps_aligned_adapters_alone_is_the_papers_finding():
    results = make_results({0.0: 1.0, 1.0: 0.2}, {0.0: 1.001, 1.0: 0.1})
    summary = SandboxStudy.summarise(OPTIONS, results)
    assert [claim.verdict for claim in summary.claims] == ["holds"] * 4
    (crossing,) = summary.findings["boundaries"]["soft"]["0.0"]["evolution_equals_gradient"]
    assert crossing == pytest.approx(0.0011 / 0.101, abs=1e-4)
    for figure in summary.figures:
        figure.draw(Figure())


def test_search_that_wins_everywhere_refutes_it():
    results = make_results({0.0: 1.0, 1.0: 0.2}, {0.0: 0.9, 1.0: 0.1})
    verdicts = [claim.verdict for claim in SandboxStudy.summarise(OPTIONS, results).claims]
    assert verdicts == ["does not hold"] * 4
