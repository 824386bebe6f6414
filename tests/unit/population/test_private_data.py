"""Evolution on texts that stay with contributors, beside the same texts in one place."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from adaptation_helpers import build_population, build_router
from evolution_helpers import read_results
from forking_helpers import run_forked
from private_helpers import MEMBERS, PLUGINS, RULES, Stage, build_charter, build_texts

from molora_fed.errors import MoloraError, PopulationError
from molora_fed.models.base import load_base
from molora_fed.population.adaptation_config import AdaptationConfig
from molora_fed.population.evolution import Branch
from molora_fed.population.files import fingerprint_population
from molora_fed.population.generations import evolve
from molora_fed.population.lifecycle import open_operators
from molora_fed.population.pooled import PooledData
from molora_fed.population.private import (
    Member,
    average_branches,
    check_adapted,
    evaluate_privately,
)
from molora_fed.population.private_member import carve_own
from molora_fed.population.questions import Answer, Question, load_answer, load_question
from molora_fed.population.setup import build_config
from molora_fed.population.split import Carved, Part
from molora_fed.types import Split

THREE = (*MEMBERS, Member("3" * 64, "cleo", "down"))
CONFIG = AdaptationConfig(steps=6, batch=4, seed=3, threads=1, learning_rate=1e-2)


@pytest.fixture
def base(tiny_checkpoint):
    return load_base(tiny_checkpoint("gpt_neox"))


def build_start(base):
    return Branch(build_population(base), build_router())


def evolve_privately(base, folder, stage=None):
    stage = stage or Stage(base, folder)
    return evolve(
        build_start(base), stage.data(),
        open_operators([(one.name, one.options) for one in RULES.lifecycle], PLUGINS),
        build_config(RULES, 2, seed=3, threads=1), folder / "evolution", plugins=PLUGINS,
    )  # fmt: skip


def pool(base, folder, members):
    """The same parts of the same texts, but all in one place."""
    charter = build_charter(base)
    own = [(one, carve_own(build_texts(one), charter)) for one in members]
    own.sort(key=lambda pair: pair[0].domain)

    def gather(part):
        parts = [part(carved) for _, carved in own]
        return Part(tuple(p.blocks[0] for p in parts), tuple(p.clusters[0] for p in parts))

    carved = Carved(
        domains=tuple(one.domain for one, _ in own),
        adaptation=tuple(c.adaptation[0] for _, c in own),
        fitness=gather(lambda c: c.fitness),
        guard=tuple(gather(lambda c, k=k: c.guard[k]) for k in range(RULES.generations)),
    )
    return PooledData(
        base, carved, frozenset({"base_hidden"}), folder / "pooled", scope=RULES.scope,
        plugins=PLUGINS,
    )  # fmt: skip


def test_figures_are_those_of_the_same_texts_in_one_place(tmp_path, base):
    private, pooled = Stage(base, tmp_path).data(), pool(base, tmp_path, MEMBERS)
    assert private.domains == pooled.domains
    start = build_start(base)
    found, expected = (d.measure_fitness(start, 1, None) for d in (private, pooled))
    for name in ("values", "errors", "by_domain", "regret"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-9
        )
    other = Branch(*pooled.adapt(start, CONFIG, tmp_path / "adapted", None).__dict__.values())
    arguments = dict(sample=1, delta=0.002, level=0.95, progress=None)
    one, two = (d.compare(other, start, **arguments) for d in (private, pooled))
    assert one.bound == pytest.approx(two.bound, rel=1e-6)
    assert one.clusters == two.clusters and one.degrees == pytest.approx(two.degrees)
    np.testing.assert_allclose(private.measure_gates(start), pooled.measure_gates(start), rtol=1e-9)


def test_contributors_of_one_domain_count_together(tmp_path, base):
    data = Stage(base, tmp_path, members=THREE).data()
    start = build_start(base)
    both = data.ask_moments(Question("fitness", {}, (start,)), ["full"])
    alone = (
        Stage(base, tmp_path / "two")
        .data()
        .ask_moments(Question("fitness", {}, (start,)), ["full"])
    )
    assert data.domains == ("down", "up") and both[1] == alone[1]
    assert both[0].clusters > alone[0].clusters
    assert data._weigh() == [0.5, 0.25, 0.25]


def test_adaptation_learns_and_rounds_train_one_factor_each(tmp_path, base):
    rules = RULES.model_copy(
        update={"start_steps": 20, "rounds": 3, "blocks_per_domain": 4, "generations": 1}
    )
    stage = Stage(base, tmp_path, rules=rules)
    start = build_start(base)
    config = build_config(rules, 2, seed=3, threads=1).schedule(0)
    adapted = stage.data().adapt(start, config, tmp_path / "adapted", None)
    assert stage.asked == ["adapt"] * 3
    first = stage.answers[0].branch.population.slots
    for slot, before in zip(first, start.population.slots, strict=True):
        for name, update in slot.updates.items():  # B first: fresh slots have no gradient in A
            assert torch.equal(update.a, before.updates[name].a)
            assert not torch.equal(update.b, before.updates[name].b)
    losses = [
        Stage(base, tmp_path / str(number))
        .data()
        .ask_moments(Question("fitness", {}, (one,)), ["full"])
        for number, one in enumerate((start, adapted))
    ]
    for domain in (0, 1):
        assert losses[1][domain].mean("full") < losses[0][domain].mean("full") - 0.05


def test_the_mean_of_factors_is_the_mean_of_products(base):
    start = build_start(base)
    generator = torch.Generator().manual_seed(0)

    def change(factor):
        slots = []
        for slot in start.population.slots:
            updates = {
                name: dataclasses.replace(
                    u, **{factor: torch.randn(getattr(u, factor).shape, generator=generator)}
                )
                for name, u in slot.updates.items()
            }
            slots.append(dataclasses.replace(slot, updates=updates))
        return Branch(dataclasses.replace(start.population, slots=tuple(slots)), build_router())

    for factor in ("a", "b"):
        branches, weights = [change(factor) for _ in range(3)], [0.5, 0.25, 0.25]
        mean = average_branches(start, branches, weights, factor)
        for index, slot in enumerate(mean.population.slots):
            for name, update in slot.updates.items():
                products = [
                    w * (o.population.slots[index].updates[name].b.double()
                         @ o.population.slots[index].updates[name].a.double())
                    for o, w in zip(branches, weights, strict=True)
                ]  # fmt: skip
                torch.testing.assert_close(
                    update.b.double() @ update.a.double(), sum(products), rtol=1e-5, atol=1e-6
                )
    same = average_branches(start, [start] * 3, [1 / 3] * 3, "b")
    assert fingerprint_population(same.population) == fingerprint_population(start.population)


def test_a_whole_evolution_and_its_held_out_figures(tmp_path, base):
    stage = Stage(base, tmp_path)
    done = evolve_privately(base, tmp_path, stage)
    assert len(done.generations) == 3 and all(g.comparison for g in done.compared)
    start = build_start(base)
    result = evaluate_privately(
        stage.data(), done.branch, start, ["one"], router_name=RULES.router,
        gates={d: dict(zip(done.generations[-1].slots, g, strict=True))
               for d, g in done.generations[-1].gates.items()},
    )  # fmt: skip
    json.dumps(result, allow_nan=False)
    losses, fused = result["losses"], f"fused:{RULES.router}"
    assert set(losses["specialists"]) == {"one"} and losses["fused"][RULES.router].keys() == {
        "down", "up",
    }  # fmt: skip
    spread = result["equal_weight"][fused]
    assert spread["low"] < spread["point"] < spread["high"]
    mean = np.mean(list(losses["fused"][RULES.router].values()))
    assert spread["point"] == pytest.approx(mean)
    gain = result["gain_percent"][RULES.router]["vs_best_alone"]
    alone = result["best_alone"]["loss"]
    assert gain == pytest.approx(100 * (alone - mean) / alone)
    interval = result["gain_interval_percent"][RULES.router]["vs_best_alone"]
    assert interval["low"] < gain < interval["high"]
    assert result["interval_method"] == "Student's t by document cluster"
    # What contributors say of their texts: counts, sums and means, whatever was asked.
    for answer in stage.answers:
        assert answer.figures.keys() <= {
            "clusters", "tokens", "squares", "columns", "positions", "gates",
        }  # fmt: skip
        for sums in answer.figures.get("columns", {}).values():
            assert len(sums) == 3


def evolve_until_killed(checkpoint, folder, count):
    """Evolve in a process of its own that SIGKILL ends before the disk has the `count`-th file."""
    left = [count]
    base = load_base(Path(checkpoint))
    stage = Stage(base, Path(folder))
    real_fsync = os.fsync

    def fsync(descriptor):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real_fsync(descriptor)

    os.fsync = fsync
    evolve_privately(base, Path(folder), stage)


def test_killed_and_resumed_it_ends_with_the_same_bytes(tmp_path, tiny_checkpoint, base):
    evolve_privately(base, tmp_path / "whole")
    folder = tmp_path / "killed"
    arguments = (str(tiny_checkpoint("gpt_neox")), str(folder), 75)  # in the middle of generation 1
    ended = run_forked(tmp_path / "said", evolve_until_killed, *arguments)
    assert ended.code == -signal.SIGKILL, ended.err
    assert not (folder / "evolution" / "generations" / "0002" / "generation.json").exists()
    evolve_privately(base, folder)
    assert read_results(folder) == read_results(tmp_path / "whole")


def test_what_is_not_the_branch_that_was_sent_is_refused(base):
    start = build_start(base)
    check_adapted(start, start, who="anna")
    slots = start.population.slots
    others = [
        Branch(dataclasses.replace(start.population, slots=slots[:2]), start.router),
        Branch(dataclasses.replace(start.population, slots=slots[::-1]), start.router),
        Branch(start.population, build_router(num_slots=3, floor=0.3)),
    ]
    for other in others:
        with pytest.raises(PopulationError, match="adapted population of 'mallory'"):
            check_adapted(other, start, who="mallory")


@pytest.mark.parametrize(
    "figures",
    [{}, {"positions": 0, "gates": [0.5] * 3}, {"positions": 9, "gates": [0.5]},
     {"positions": 9, "gates": [0.5, 2.0, 0.5]}, {"positions": 9, "gates": "x"},
     {"positions": float("nan"), "gates": [0.5] * 3}],
)  # fmt: skip
def test_gates_that_are_none_are_refused(tmp_path, base, figures):
    stage = Stage(base, tmp_path)
    data = stage.data()
    data._ask = lambda question, read: [read(Answer("mallory", figures))]
    with pytest.raises(PopulationError, match="gates of 'mallory'"):
        data.measure_gates(build_start(base))


def test_an_answer_without_a_population_is_refused(tmp_path, base):
    data = Stage(base, tmp_path).data()
    data._ask = lambda question, read: [read(Answer("mallory", {}))]
    with pytest.raises(PopulationError, match="answer of 'mallory'"):
        data.adapt(build_start(base), CONFIG, tmp_path / "a", None)


def test_malformed_folders_are_refused(tmp_path, base):
    limits = build_charter(base).identity.adapters
    for content in ("", "[]", '{"kind": "run", "settings": {}}', '{"kind": "gates"}', "[" * 10**5,
                    '{"kind": "gates", "settings": {}}', "x" * 2_000_000):  # fmt: skip
        (tmp_path / "question.json").write_text(content)
        (tmp_path / "answer.json").write_text(content if content != "[]" else "3")
        with pytest.raises(MoloraError) as caught:
            load_question(tmp_path, rules=limits, plugins=PLUGINS)
        assert "\n" not in str(caught.value)
    (tmp_path / "answer.json").write_text("3")
    with pytest.raises(PopulationError):
        load_answer(tmp_path, contributor="mallory", rules=limits, plugins=PLUGINS)


def test_questions_that_do_not_fit_are_refused(tmp_path, base):
    stage = Stage(base, tmp_path)
    person, start = stage.people["anna"], build_start(base)
    for question in (
        Question("adapt", {"steps": 3}, (start,)),
        Question("adapt", {"surprise": 1}, (start,)),
        Question("guard", {"sample": 99}, (start, start)),
        Question("guard", {}, (start, start)),
    ):
        with pytest.raises(PopulationError):
            person.answer(question)


def test_too_little_text_is_said_in_one_line(base):
    texts = build_texts(MEMBERS[0], count=12)
    with pytest.raises(PopulationError, match="document clusters") as caught:
        carve_own(texts, build_charter(base))
    assert "\n" not in str(caught.value)
    texts = {**build_texts(MEMBERS[0]), Split.HELD_OUT: texts[Split.HELD_OUT].take(1)}
    with pytest.raises(PopulationError, match="2 for held-out figures"):
        carve_own(texts, build_charter(base))
