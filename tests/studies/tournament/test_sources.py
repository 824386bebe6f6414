"""Arenas of a study's fusions: the same text, columns and figures as the study's own."""

from dataclasses import replace

import pytest
from molora_studies.framework.contract import Cell, Study, StudyOptions
from molora_studies.framework.results import PlannedStudy
from molora_studies.framework.schedule import collect_tasks
from molora_studies.framework.store import TaskStore
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
from molora_studies.framework.worker import run_task
from molora_studies.tournament.arena import TournamentSettings
from molora_studies.tournament.matches import hold_tournament
from molora_studies.tournament.sources import list_study_arenas

from molora_fed.errors import StudyError
from molora_fed.plugins import load_plugins

DOMAINS = ("readme", "science")
BASE = plan_base(
    BaseSettings(hidden=32, layers=2, heads=2, vocab_size=400, steps=20, domains=DOMAINS)
)


def plan(seed, rivals=None, **settings):
    corpora = {domain: plan_corpus(BASE, domain) for domain in DOMAINS}
    recipe = SpecialistSettings(steps=10, seed=seed)
    members = [
        Member(domain, plan_specialist(BASE, corpus, recipe), corpus)
        for domain, corpus in corpora.items()
    ]
    chosen = FusionSettings(
        routers={"evidence-zero": {}}, merges=(), seed=seed, calibration=8, held_out=8, **settings
    )
    return plan_fusion(f"two, seed {seed}", BASE, members, chosen, baselines=rivals)


def plan_study(cache, seeds=(1, 2)):
    cells = [Cell(f"ours seed {seed}", {"seed": seed}, plan(seed)) for seed in seeds]
    cells += [
        Cell("as published seed 1", {"seed": 1}, plan(1, mixture="logit")),
        Cell("once seed 1", {"seed": 1}, plan(3)),
    ]
    return PlannedStudy("two", "tests", Study, StudyOptions(), cells, cache)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The study with its two fusions of one recipe done, and no other."""
    found = plan_study(tmp_path_factory.mktemp("cache"))
    for cell in found.cells[:2]:
        for task in collect_tasks([cell.task]).values():
            assert run_task(task, found.cache)
    return found


@pytest.mark.processes
def test_arenas_are_fusions_of_several_trainings_as_we_fuse(planned):
    found = list_study_arenas(planned)
    assert [(one.cooperative, one.training) for one in found] == [
        ("two", "seed 1"),
        ("two", "seed 2"),
    ]


def test_a_specialist_that_is_not_trained_is_named(tmp_path):
    with pytest.raises(StudyError, match=r"got nothing of 'base builtin .*' and 6 more"):
        list_study_arenas(plan_study(tmp_path))
    with pytest.raises(StudyError, match="fusions of several seeds"):
        list_study_arenas(plan_study(tmp_path, seeds=(1,)))


@pytest.mark.processes
def test_specialists_suffice_without_the_fusion_and_the_models_it_compares(planned, tmp_path):
    rival = plan_specialist(BASE, plan_corpus(BASE, "readme"), SpecialistSettings(steps=10, seed=9))
    cells = [
        replace(cell, task=plan(cell.labels["seed"], rivals={"everybody's text": rival}))
        for cell in planned.cells[:2]
    ]
    assert not any(TaskStore.in_cache(planned.cache).is_done(cell.task) for cell in cells)
    settings = TournamentSettings(tmp_path, load_plugins(), ("evidence-zero",), (), 1)
    alone = hold_tournament(settings, list_study_arenas(replace(planned, cells=cells)))
    fused = hold_tournament(settings, list_study_arenas(planned))
    assert [one["losses_nats"] for one in alone.matches] == [
        one["losses_nats"] for one in fused.matches
    ]


@pytest.mark.processes
def test_a_match_has_the_studys_own_figures_and_its_folder_stays_as_it_is(planned, tmp_path):
    store = TaskStore.in_cache(planned.cache)
    done = [store.read(cell.task)[0] for cell in planned.cells[:2]]
    before = {path: path.stat().st_mtime_ns for one in done for path in one.folder.rglob("*")}
    plugins = load_plugins()
    settings = TournamentSettings(
        folder=tmp_path,
        plugins=plugins,
        routers=("evidence-zero", "linear"),
        unseen=("readme", "headers-python"),
        unseen_tokens=512,
    )
    held = hold_tournament(settings, list_study_arenas(planned))
    for one, arena, match in zip(done, held.arenas, held.matches[::2], strict=True):
        assert match["losses_nats"] == one.result["held_out"]["fused"]["evidence-zero"]
        assert arena["unseen"].keys() == {"headers-python"}
        assert arena["unseen_left_out"] == {"readme": "a specialist was trained on it"}
    assert {
        path: path.stat().st_mtime_ns for one in done for path in one.folder.rglob("*")
    } == before
