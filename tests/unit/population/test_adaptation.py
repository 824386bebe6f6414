import json
import math
import signal
from dataclasses import replace

import pytest
import torch
from adaptation_helpers import (
    CONFIG,
    adapt_counting,
    adapt_until_killed,
    build_all_states,
    build_population,
    build_router,
)
from forking_helpers import run_forked

from molora_fed.bank.states import take_balanced
from molora_fed.errors import PopulationError, TrainingError
from molora_fed.models.base import load_base
from molora_fed.population import adaptation
from molora_fed.population.adaptation import adapt, compute_loss
from molora_fed.population.adaptation_config import AdaptationConfig
from molora_fed.population.files import fingerprint_population
from molora_fed.population.mixture import Mixture
from molora_fed.population.router_files import pack_router


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return load_base(tiny_checkpoint())


def bytes_of(result):
    population, router = result
    return fingerprint_population(population), pack_router(router, "parallel-sigmoid")


def test_adaptation_lowers_the_loss_and_leaves_its_inputs_alone(base, tmp_path):
    states = build_all_states(base, tmp_path / "states")
    population, router = build_population(base), build_router()
    before = bytes_of((population, router))
    weights = {name: value.clone() for name, value in base.model.state_dict().items()}
    config = replace(CONFIG, steps=30, total_steps=60)
    adapted, learned = adapt(base, population, router, states, config, tmp_path / "run")

    assert bytes_of((population, router)) == before
    assert all(torch.equal(v, weights[name]) for name, v in base.model.state_dict().items())
    assert not base.model.training and not any(p.requires_grad for p in base.model.parameters())
    assert [slot.birth for slot in adapted.slots] == [slot.birth for slot in population.slots]
    assert all(p.requires_grad for p in learned.parameters()) and not learned.training
    batch = take_balanced(states, 0, batch=24, seed=0)
    with torch.no_grad():
        first = compute_loss(base.model, Mixture(base.model, population), router, batch)
        last = compute_loss(base.model, Mixture(base.model, adapted), learned, batch)
    assert last < first - 0.3


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(base, tmp_path):
    first = bytes_of(adapt_counting(base, tmp_path / "first"))
    torch.manual_seed(991)
    often = replace(CONFIG, checkpoint_every=1)
    assert bytes_of(adapt_counting(base, tmp_path / "second", config=often)) == first
    other = bytes_of(adapt_counting(base, tmp_path / "third", config=replace(CONFIG, seed=6)))
    assert other[0] != first[0] and other[1] != first[1]


def test_a_killed_adaptation_goes_on_to_the_same_bytes(base, tiny_checkpoint, tmp_path):
    expected = bytes_of(adapt_counting(base, tmp_path / "whole"))
    ended = run_forked(
        tmp_path / "said", adapt_until_killed, str(tiny_checkpoint()), str(tmp_path / "killed"), 6
    )
    assert ended.code == -signal.SIGKILL, ended.err
    assert bytes_of(adapt_counting(base, tmp_path / "killed")) == expected


class Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [4, 5, 10, 12])
def test_a_stopped_adaptation_goes_on_to_the_same_bytes(base, tmp_path, at):
    expected = bytes_of(adapt_counting(base, tmp_path / "whole"))

    def stop(done, total, **fields):
        if done == at:
            raise Stopped

    with pytest.raises(Stopped):
        adapt_counting(base, tmp_path / "stopped", progress=stop)
    steps = []
    report = lambda done, total, **fields: steps.append(done)  # noqa: E731
    assert bytes_of(adapt_counting(base, tmp_path / "stopped", progress=report)) == expected
    assert steps[0] > (at - 1) // 4 * 4  # what the last checkpoint has is not done again
    whole, stopped = (
        [json.loads(line) for line in (tmp_path / name / "adaptation/adaptation.jsonl").open()]
        for name in ("whole", "stopped")
    )
    assert [{**row, "seconds": 0} for row in whole] == [{**row, "seconds": 0} for row in stopped]


def test_a_finished_adaptation_is_read_back(base, tmp_path, monkeypatch):
    first = bytes_of(adapt_counting(base, tmp_path))
    monkeypatch.setattr(adaptation, "compute_loss", lambda *a: pytest.fail("trained again"))
    assert bytes_of(adapt_counting(base, tmp_path)) == first


def test_a_run_of_other_inputs_is_refused(base, tmp_path):
    adapt_counting(base, tmp_path)
    with pytest.raises(TrainingError, match=r"router_options .*'floor': 0\.1.*start again"):
        adapt_counting(base, tmp_path, router=build_router(floor=0.2))
    with pytest.raises(TrainingError, match=r"got learning_rate 0\.01 instead of 0\.001"):
        adapt_counting(base, tmp_path, config=replace(CONFIG, learning_rate=1e-3))


def test_progress_and_lines(base, tmp_path):
    calls = []
    adapt_counting(base, tmp_path, progress=lambda *a, **fields: calls.append((a, fields)))
    assert [done for (done, _), _ in calls] == [4, 5, 8, 10, 12]
    assert set(calls[0][1]) == {"loss", "eta_seconds"} and calls[-1][1]["eta_seconds"] == 0
    lines = (tmp_path / "adaptation/adaptation.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [4, 5, 8, 10, 12]
    assert set(rows[0]) == {"step", "loss", "rate_scale", "seconds"}


@pytest.mark.parametrize("frozen", ["learning_rate", "router_learning_rate"])
def test_a_rate_of_0_freezes_its_part(base, tmp_path, frozen):
    before = bytes_of((build_population(base), build_router(anneal=False)))
    after = bytes_of(
        adapt_counting(
            base, tmp_path, config=replace(CONFIG, **{frozen: 0}), router=build_router(anneal=False)
        )
    )
    kept = 0 if frozen == "learning_rate" else 1
    assert after[kept] == before[kept] and after[1 - kept] != before[1 - kept]


def test_several_adaptations_follow_one_schedule(base, tmp_path):
    whole = AdaptationConfig(steps=40, batch=4, seed=5, threads=1)
    parts = [replace(whole, steps=20, first_step=first, total_steps=40) for first in (0, 20)]
    after_warmup = 15
    assert parts[0].scale_rate(after_warmup) == whole.scale_rate(after_warmup)
    assert parts[1].scale_rate(after_warmup) == whole.scale_rate(20 + after_warmup)
    assert parts[1].scale_rate(0) == pytest.approx(whole.scale_rate(20) / whole.warmup)

    states = build_all_states(base, tmp_path / "states")
    seen = []
    population, router = build_population(base), build_router(hot=2.0, cold=0.5)
    for index, part in enumerate(parts):
        part = replace(part, steps=2, first_step=index * 2, total_steps=4)
        population, router = adapt(base, population, router, states, part, tmp_path / str(index))
        seen.append(float(router.temperature))
    assert seen == pytest.approx([1.0, 0.5])


def test_a_router_with_a_part_that_never_takes_part_is_trained(base, tmp_path):
    router = build_router()
    router.register_parameter("spare", torch.nn.Parameter(torch.ones(3)))
    _, learned = adapt_counting(base, tmp_path, router=router)
    assert torch.equal(learned.spare, torch.ones(3))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 0}, "steps 0"),
        ({"router_learning_rate": -1.0}, "router_learning_rate -1.0"),
        ({"learning_rate": math.nan}, "learning_rate nan"),
        ({"total_steps": 5}, "steps up to 12 of 5"),
        ({"learning_rate": 0.0, "router_learning_rate": 0.0}, "got neither"),
    ],
)
def test_settings_that_cannot_be_trained_with_are_named(base, tmp_path, change, named):
    with pytest.raises(TrainingError) as caught:
        adapt_counting(base, tmp_path, config=replace(CONFIG, **change))
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_inputs_are_refused(base, tmp_path):
    with pytest.raises(PopulationError, match="a router of 3 slots, got 2"):
        adapt_counting(base, tmp_path, router=build_router(num_slots=2))
    with pytest.raises(PopulationError, match="got 3 blocks for 2 domains"):
        adapt_counting(base, tmp_path, config=replace(CONFIG, batch=3))
    states = build_all_states(base, tmp_path / "states")
    population = build_population(base)
    with pytest.raises(TrainingError, match="a domain twice"):
        adapt(base, population, build_router(), [states[0]] * 2, CONFIG, tmp_path)
    with pytest.raises(TrainingError, match="block sizes none"):
        adapt(base, population, build_router(), [], CONFIG, tmp_path)


def test_a_loss_that_is_not_finite_ends_it_before_a_checkpoint(base, tmp_path):
    router = build_router()
    with torch.no_grad():
        router.weight[0, 0] = math.nan
    with pytest.raises(TrainingError, match="finite loss up to step 4, got nan"):
        adapt_counting(base, tmp_path, router=router)
    assert not (tmp_path / "adaptation/adaptation.safetensors").exists()
