"""Matches on a tiny cooperative: a fusion's own figures, failures as rows, nothing done twice."""

import dataclasses
import types

import pytest
from fusion_helpers import build_cooperative
from molora_studies.tournament import matches
from molora_studies.tournament.arena import (
    Arena,
    ArenaSource,
    TournamentSettings,
    Unseen,
    compare_text,
    link_columns,
)
from molora_studies.tournament.matches import hold_tournament
from molora_studies.tournament.page import ALL, rank_all, write_tournament

from molora_fed import hookimpl
from molora_fed.adapters.files import load_adapter
from molora_fed.bank import Expert
from molora_fed.evaluation.evaluate import evaluate
from molora_fed.fusion.collapse import fit_guarded
from molora_fed.fusion.plan import BASE_EXPERT
from molora_fed.plugins import load_plugins
from molora_fed.routing.contract import OutputRouter, RouterOptions

READS = frozenset({"evidence"})


class Broken(OutputRouter):
    """Fails in its fit."""

    readings = READS

    @classmethod
    def learn(cls, bank, options, seed, progress):
        raise IndexError("no such expert")

    def scores(self, view):
        return view.evidence


class Changing(OutputRouter):
    """Changes the bank it was handed."""

    readings = READS

    @classmethod
    def learn(cls, bank, options, seed, progress):
        bank.logprob.mul_(0.5)
        return cls(bank.num_experts, options)

    def scores(self, view):
        return view.evidence


class NeedyOptions(RouterOptions):
    """Has an option without a default."""

    width: int


class Needy(OutputRouter[NeedyOptions]):
    """Cannot be made from defaults."""

    readings = READS

    def scores(self, view):
        return view.evidence


@hookimpl
def register_routers(register):
    """Register all three."""
    for name, router in (("broken", Broken), ("changing", Changing), ("needy", Needy)):
        register(name, router, summary="Fails", source="own definition")


@pytest.fixture(scope="module")
def cooperative(tiny_checkpoint, tmp_path_factory):
    return build_cooperative(tiny_checkpoint(), tmp_path_factory.mktemp("experts"))


@pytest.fixture
def settings(tmp_path):
    plugin = types.ModuleType("failing")
    plugin.register_routers = register_routers
    return TournamentSettings(
        folder=tmp_path / "tournament",
        plugins=load_plugins([("failing (molora-failing 1.0)", plugin)]),
        routers=("evidence-zero", "linear", "linear-noncausal"),
        unseen=(),
        unseen_tokens=64,
    )


def open_arena(cooperative, folder, *, training="seed 7", unseen=True):
    """The first two contributions' domains; the third's text stands for text of nobody."""
    base, contributions = cooperative
    own, other = contributions[:2], contributions[2]
    foreign = dataclasses.replace(other.held_out, domain="poems")
    found = Unseen((foreign,) if unseen else (), {} if unseen else {"poems": "too short"})
    held_out = tuple(one.held_out for one in own)
    return Arena(
        cooperative="tiny",
        training=training,
        base=base,
        experts=(
            Expert(BASE_EXPERT, None),
            *(Expert(one.contributor, load_adapter(one.adapter)) for one in own),
        ),
        calibration=tuple(one.calibration for one in own),
        held_out=held_out,
        unseen=found,
        overlaps=compare_text(held_out, found, [], base.tokenizer),
        bank={"mixture": "probability", "frozen_depth": 1},
        guard={"restarts": 1},
        seed=7,
        folder=folder,
    )


@pytest.fixture
def source(cooperative, tmp_path):
    folder = tmp_path / "bank"
    return ArenaSource("tiny", "seed 7", lambda settings: open_arena(cooperative, folder))


def test_a_match_has_the_figures_of_the_one_evaluation(settings, source):
    held = hold_tournament(settings, [source])
    assert [match["router"] for match in held.matches] == list(settings.routers)
    arena = source.open(settings)
    readings = frozenset({"evidence", "mean_hidden"})
    bank, held_out = arena.open_calibration(readings), arena.open_held_out(readings)
    router = settings.plugins.routers.resolve("linear")
    fitted = fit_guarded(router, bank, router.Options(), 7, restarts=1).router
    expected = evaluate(held_out, {"linear": fitted})
    foreign = evaluate(arena.open_unseen(readings), {"linear": fitted})
    match = held.matches[1]
    losses, oracle = expected.losses("fused:linear"), expected.losses("domain_oracle")
    worst = max(losses, key=lambda domain: losses[domain] - oracle[domain])
    assert match["losses_nats"] == losses
    assert match["worst_domain"] == {"domain": worst, "nats": losses[worst] - oracle[worst]}
    assert match["worst_document_nats"] == float(expected.excess["linear"].max())
    assert match["oracle_gap_nats"] == pytest.approx(
        expected.equal_weight("fused:linear") - expected.equal_weight("domain_oracle")
    )
    assert match["unseen_nats"] == pytest.approx(
        foreign.equal_weight("fused:linear") - foreign.equal_weight("base")
    )
    assert match["unseen_by_domain_nats"].keys() == {"poems"}
    assert match["seconds"]["fit"] > 0 and match["seconds"]["step"] > 0 < match["seconds"]["base"]
    assert not held.matches[2]["causal"] and held.matches[2]["seconds"]["step"] is None


def test_a_router_that_fails_is_a_row_and_takes_nothing_from_the_others(settings, source):
    alone = hold_tournament(settings, [source])
    names = ("broken", "changing", "needy", *settings.routers)
    other = dataclasses.replace(settings, routers=names, folder=settings.folder / "again")
    held = hold_tournament(other, [source])
    broken, changing, needy, *good = held.matches
    assert broken["failed"].startswith("failed: Router 'broken' of failing (molora-failing 1.0)")
    assert "IndexError: no such expert" in broken["failed"] and "\n" not in broken["failed"]
    assert "a bank that stays as it was" in changing["failed"]
    assert "width" in needy["failed"] and "Give its options defaults" in needy["failed"]
    assert len(list((other.folder / "matches").iterdir())) == len(good)  # failures are not kept
    for before, now in zip(alone.matches, good, strict=True):
        assert before["losses_nats"] == now["losses_nats"]


def test_finished_matches_are_not_played_again(settings, source, monkeypatch):
    first = hold_tournament(settings, [source])
    played = []
    measure = matches._measure

    def count(arena, player, readings):
        played.append(player.entry.name)
        return measure(arena, player, readings)

    monkeypatch.setattr(matches, "_measure", count)
    assert hold_tournament(settings, [source]).matches == first.matches
    assert played == []
    monkeypatch.setattr(matches, "hash_code_of", lambda package: f"{package}, changed")
    hold_tournament(dataclasses.replace(settings, routers=("evidence-zero",)), [source])
    assert played == ["evidence-zero"]


def test_a_tournament_that_was_stopped_goes_on(settings, source, monkeypatch):
    measure, played = matches._measure, []

    def stop_at_the_second(arena, player, readings):
        if played:
            raise KeyboardInterrupt
        played.append(player.entry.name)
        return measure(arena, player, readings)

    with monkeypatch.context() as patch:
        patch.setattr(matches, "_measure", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            hold_tournament(settings, [source])
    left = []

    def note(arena, player, readings):
        left.append(player.entry.name)
        return measure(arena, player, readings)

    monkeypatch.setattr(matches, "_measure", note)
    hold_tournament(settings, [source])
    assert played == ["evidence-zero"] and left == ["linear", "linear-noncausal"]


def test_columns_of_a_fusion_are_used_and_its_folder_stays_as_it_is(
    cooperative, settings, tmp_path
):
    made = tmp_path / "fusion"
    arena = open_arena(cooperative, made, unseen=False)
    arena.open_calibration(READS)
    arena.open_held_out(READS)
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    passes = []

    def watch(done, total, **fields):
        passes.append((done, fields.get("expert")))

    again = open_arena(cooperative, tmp_path / "own")
    link_columns(made, again.folder)
    again.open_calibration(READS, watch)
    assert {path.name for path in again.folder.iterdir()} >= set(before)
    assert all(done % sum(map(len, again.calibration)) == 0 for done, _ in passes)  # no pass ran
    again.open_unseen(frozenset({"evidence", "mean_hidden"}))
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == before


def test_without_text_of_nobody_there_is_no_figure_and_the_page_says_why(
    cooperative, settings, tmp_path
):
    arena = open_arena(cooperative, tmp_path / "bank", unseen=False)
    held = hold_tournament(settings, [ArenaSource("tiny", "seed 7", lambda settings: arena)])
    assert {match["unseen_nats"] for match in held.matches} == {None}
    page = write_tournament(held, tmp_path / "out", "molora tournament tiny")[1].read_text()
    assert "Not measured: poems, too short." in page and "not measured" in page


def test_files_are_the_same_for_the_same_matches(cooperative, settings, tmp_path):
    sources = [
        ArenaSource(
            "tiny",
            training,
            lambda settings, training=training: open_arena(
                cooperative, tmp_path / "bank", training=training
            ),
        )
        for training in ("seed 7", "seed 8")
    ]
    names = ("broken", *settings.routers)
    held = hold_tournament(dataclasses.replace(settings, routers=names), sources)
    command = "molora tournament --study tiny"
    one, two = (write_tournament(held, tmp_path / name, command) for name in ("a", "b"))
    assert [path.name for path in one] == ["tournament.json", "tournament.md", "tournament.svg"]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    page = one[1].read_text()
    assert f"`{command}`" in page and "Trainings (2): seed 7, seed 8." in page
    assert "failed: Router 'broken'" in page and "cannot decode" in page
    assert ALL not in rank_all(held)  # one cooperative: its own table says it all
