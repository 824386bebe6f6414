"""`molora tournament`: on a cooperative of this machine, and what it refuses."""

import json
import shutil

import pytest


@pytest.fixture
def arena(fused_once, tmp_path, monkeypatch):
    """A copy of a fused cooperative, and a cache of its own."""
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    shutil.copytree(fused_once / "tiny", tmp_path / "tiny")
    return tmp_path / "tiny"


def test_routers_are_ranked_on_a_cooperatives_own_text(molora, arena, tmp_path):
    out = tmp_path / "out"
    given = ("tournament", arena, "--routers", "uniform,evidence-zero,linear", "--unseen", "readme")
    ran = molora(*given, "--unseen-tokens", 64, "--out", out)
    assert ran.code == 0, ran.err
    document = json.loads((out / "tournament.json").read_text())
    assert {match["failed"] for match in document["matches"]} == {None}
    (only,) = document["arenas"]
    assert only["cooperative"] == "tiny" and only["held_out"].keys() == {"abc", "xyz"}
    assert only["unseen"] == {"readme": 2}
    places = {one["router"]: one["rank"] for one in document["standings"]["tiny"]}
    assert sorted(places.values()) == [1, 2, 3]
    assert document["standings"]["tiny"][0]["gap"]["span"] == {"low": None, "high": None}
    assert "--unseen-tokens 64" in document["command"]
    assert "uniform" in ran.out and f"wrote  {out / 'tournament.svg'}" in ran.out
    before = document["matches"]
    assert molora(*given, "--unseen-tokens", 64, "--out", out).code == 0
    assert json.loads((out / "tournament.json").read_text())["matches"] == before


def test_it_needs_an_arena(molora):
    ran = molora("tournament")
    assert ran.code == 10 and "a cooperative's folder or --study NAME, got none" in ran.err


def test_texts_that_stay_with_contributors_are_refused(molora, tmp_path, tiny_checkpoint):
    folder = tmp_path / "coop"
    create = ("coop", "create", "c", "--base", tiny_checkpoint(), "--folder", folder)
    assert molora(*create, "--block-size", "32", "--domains", "abc,xyz").code == 0
    ran = molora("tournament", folder)
    assert ran.code == 10 and "privacy mode 'pooled'" in ran.err and ran.err.count("\n") == 1


def test_a_cooperative_without_contributions_is_refused(molora, setup, tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    ran = molora("tournament", setup.cooperative, "--unseen", "")
    assert ran.code == 10 and "Run `molora fuse` first" in ran.err


def test_a_study_that_did_not_run_is_refused(molora, tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    ran = molora("tournament", "--study", "routers")
    assert ran.code != 0 and "Run `molora study routers` first" in ran.err
    ran = molora("tournament", "--study", "published")
    assert ran.code != 0 and "expected fusions of several seeds" in ran.err
