"""Every step alone: create, train, fuse, evaluate, generate, report, on folders."""

import json
import re
import shutil

import pytest

from molora_fed.contributions.manifest import load_contribution
from molora_fed.contributions.states import ContributionState, CooperativeState
from molora_fed.cooperative.cooperative import open_cooperative
from molora_fed.storage.files import hash_file
from molora_fed.storage.options import name_choices


@pytest.fixture(scope="module")
def fused(fused_once, tmp_path_factory):
    """A copy of the cooperative with both contributions fused, and where the result lies."""
    return shutil.copytree(fused_once, tmp_path_factory.mktemp("steps") / "fused")


def test_create_prints_identity_and_fingerprints_and_finds_it_again(
    molora, tmp_path, tiny_checkpoint
):
    options = ("--base", tiny_checkpoint(), "--folder", tmp_path / "c", "--block-size", "32")
    first, again = (molora("coop", "create", "one", *options) for _ in range(2))
    assert (first.code, again.code, first.err) == (0, 0, "")
    assert first.out == again.out
    charter = open_cooperative(tmp_path / "c").charter
    for shown in (charter.identity_hash, charter.identity.base.weights):
        assert shown in first.out


def test_create_writes_the_options_into_the_charter(molora, tmp_path, tiny_checkpoint):
    ran = molora(
        "coop", "create", "one", "--base", tiny_checkpoint(), "--folder", tmp_path / "c",
        "--domains", "law,art", "--frozen-depth", 1, "--kind", "delta", "--rank", 8, "--steps", 7,
        "--router", "linear", "--compare", "evidence-zero", "--mixture", "logit", "--expected", 3,
        "--seed", 5, "--block-size", 16, "--deadline", 3600, "--quorum", 2,
    )  # fmt: skip
    assert ran.code == 0
    charter = open_cooperative(tmp_path / "c").charter
    amendment = charter.amendment
    assert charter.identity.adapters.frozen_depth == 1
    assert charter.identity.corpus.block_size == 16
    assert (amendment.domains, amendment.expected, amendment.seed) == (("law", "art"), 3, 5)
    assert (amendment.deadline_seconds, amendment.quorum) == (3_600, 2)
    training = amendment.training
    assert (training.kind, training.rank, training.steps) == ("delta", 8, 7)
    fusion = amendment.fusion
    assert (fusion.router, fusion.compare, fusion.mixture) == (
        "linear", name_choices("evidence-zero"), "logit",
    )  # fmt: skip


def test_a_cooperative_is_created_with_options_of_its_compared_routers(
    molora, tmp_path, tiny_checkpoint
):
    common = ("--base", tiny_checkpoint(), "--folder", tmp_path / "c", "--block-size", 16)
    table = '["evidence", {name = "linear", label = "slow", options = {%s = 1}}]'
    refused = molora("coop", "create", "one", *common, "--compare", table % "stepz")
    assert refused.code and refused.err.count("\n") == 1 and "stepz" in refused.err
    assert molora("coop", "create", "one", *common, "--compare", table % "steps").code == 0
    compare = open_cooperative(tmp_path / "c").charter.amendment.fusion.compare
    assert [one.key for one in compare] == ["evidence", "slow"]
    assert compare[1].options == {"steps": 1}


def test_an_option_that_a_domain_does_not_know_is_refused_before_training(molora, setup, tmp_path):
    common = ("train", "--cooperative", setup.cooperative, "--out", tmp_path / "out")
    option = ("--domain-option", "colour=red")
    refused = molora(*common, "--domain", "python", *option)
    assert refused.code == 10 and refused.err.count("\n") == 1
    assert "domain 'python'" in refused.err and "colour" in refused.err
    refused = molora(*common, "--domain", "abc", "--data", setup.texts["abc"], *option)
    assert refused.code == 10 and "Leave out --data or --domain-option" in refused.err


def test_a_quorum_above_what_is_expected_is_refused_in_one_line(molora, tmp_path, tiny_checkpoint):
    common = ("--base", tiny_checkpoint(), "--folder", tmp_path / "c", "--block-size", 16)
    refused = molora("coop", "create", "one", *common, "--expected", 2, "--quorum", 3)
    assert refused.code and refused.err.count("\n") == 1
    assert "expected a quorum of at most the 2 expected, got 3" in refused.err
    assert not (tmp_path / "c" / "cooperative.toml").exists()
    unending = molora("coop", "create", "one", *common, "--deadline", "nan")
    assert unending.code == 10 and "expected a deadline in seconds, got nan" in unending.err
    assert molora("coop", "create", "one", *common, "--expected", 3, "--quorum", 3).code == 0
    amended = molora("coop", "amend", tmp_path / "c", "--set", "expected=2")
    assert "a quorum of at most the 2 expected" in amended.err
    ran = molora("coop", "amend", tmp_path / "c", "--set", "quorum=2", "--set", "expected=2")
    assert ran.code == 0
    amendment = open_cooperative(tmp_path / "c").charter.amendment
    assert (amendment.expected, amendment.quorum) == (2, 2)


def test_train_prints_contamination_and_what_would_leave(molora, setup, tmp_path):
    ran = molora(
        "train", "--cooperative", setup.cooperative / "cooperative.toml", "--domain", "abc",
        "--data", setup.texts["abc"], "--out", tmp_path / "t", "--steps", 3, "--kind", "delta",
        "--seed", 9, "--threads", 1,
    )  # fmt: skip
    assert ran.code == 0
    assert re.fullmatch(r"Training needs about \S+ MB of memory .* are free\n", ran.err)
    contribution = load_contribution(tmp_path / "t" / "contribution")
    manifest = contribution.manifest
    assert manifest.kind == "delta"
    assert manifest.training["settings"]["seed"] == 9
    assert "8-grams in train" in ran.out
    for entry in manifest.sample_files.values():
        assert f"{entry.blocks:,}" in ran.out
        assert f"{entry.tokens:,}" in ran.out
    assert contribution.id in ran.out
    assert (tmp_path / "t" / "key.pem").stat().st_mode & 0o777 == 0o600


def test_train_again_gives_the_same_contribution(molora, setup):
    before = load_contribution(setup.trained["abc"] / "contribution").id
    ran = molora(
        "train", "--cooperative", setup.cooperative, "--domain", "abc", "--data",
        setup.texts["abc"], "--out", setup.trained["abc"], "--threads", 1, "--name", "abc-1",
    )  # fmt: skip
    assert (ran.code, load_contribution(setup.trained["abc"] / "contribution").id) == (0, before)


def test_fuse_writes_report_and_fused_model_and_keeps_the_ledger(setup, fused):
    result = json.loads((fused / "out" / "report" / "report.json").read_text())
    assert set(result["losses"]["specialists"]) == {"abc-1", "xyz-1"}
    routers = {"evidence-mixed", "evidence", "evidence-zero", "linear"}
    assert set(result["losses"]["fused"]) == routers
    assert set(result["overlap"]["compared"]["train"]) == {"abc-1", "xyz-1"}
    assert (fused / "out" / "report" / "report.html").is_file()
    assert (fused / "out" / "report" / "metrics" / "abc-1.jsonl").is_file()
    with open_cooperative(fused / "tiny").read_ledger() as ledger:
        assert ledger.cooperative_state == CooperativeState.PUBLISHED
        assert len(ledger.contributions(ContributionState.ADMITTED)) == 2
        forecasts = ledger.records("forecast")
    assert {forecast.data["predictor"] for forecast in forecasts} == set(result["forecasts"])
    assert all(forecast.outcome is not None for forecast in forecasts)


def test_fuse_without_arguments_takes_all_admitted(molora, fused):
    ran = molora("fuse", "--cooperative", fused / "tiny", "--out", fused / "again")
    assert (ran.code, ran.err) == (0, "")
    first, second = (
        json.loads((fused / name / "result.json").read_text()) for name in ("out", "again")
    )
    assert first["losses"] == second["losses"]


def test_fuse_refuses_a_changed_contribution_and_fuses_nothing(molora, setup, tmp_path):
    shutil.copytree(setup.cooperative, tmp_path / "tiny")
    shutil.copytree(setup.trained["abc"], tmp_path / "abc")
    weights = tmp_path / "abc" / "contribution" / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    ran = molora(
        "fuse", "--cooperative", tmp_path / "tiny", tmp_path / "abc", "--out", tmp_path / "o"
    )
    assert ran.code == 20
    assert len(ran.err.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_evaluate_prints_all_methods(molora, setup, fused):
    ran = molora(
        "evaluate", fused / "out", "--data", f"mine={setup.texts['abc']}", "--data",
        f"other={setup.texts['xyz'] / '000.txt'}", "--block-size", 32,
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    for word in ("mine", "other", "base", "abc-1", "xyz-1", "fused, evidence", "domain oracle"):
        assert word in ran.out


def test_evaluate_reads_the_field_that_is_asked_for(molora, fused, tmp_path):
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps({"post": {"body": "abc dab " * 40}}) + "\n")
    options = ("evaluate", fused / "out", "--data", f"mine={records}", "--block-size", 32)
    assert molora(*options).code != 0
    assert molora(*options, "--text-field", "post.body").code == 0


def test_generate_continues_the_prompt_and_repeats_itself(molora, fused):
    options = ("--prompt", "abc dab", "--max-new-tokens", 8)
    first, again = (molora("generate", fused / "out", *options) for _ in range(2))
    assert first.code == 0
    assert first.out.startswith("abc dab")
    assert first.out == again.out
    sampled = molora(
        "generate", fused / "out" / "fused", *options, "--temperature", 1, "--seed", 3, "--top-p",
        0.9, "--evidence-from", "prompt",
    )  # fmt: skip
    assert sampled.code == 0
    assert sampled.err.startswith("gates: ")


def test_report_draws_the_same_again(molora, fused):
    folder = fused / "out" / "report"
    before = hash_file(folder / "report.json")
    (folder / "report.html").unlink()
    ran = molora("report", fused / "out")
    assert (ran.code, ran.err) == (0, "")
    assert (folder / "report.html").is_file()
    assert hash_file(folder / "report.json") == before


def hash_files(folder):
    """Of all files, without those that SQLite makes for whoever reads a ledger."""
    files = (path for path in folder.rglob("*") if path.is_file())
    files = (path for path in files if not path.name.startswith("ledger.db-"))
    return {path.relative_to(folder): hash_file(path) for path in sorted(files)}


def test_a_router_is_tried_beside_the_charters_and_nothing_is_recorded(molora, fused, tmp_path):
    cooperative = shutil.copytree(fused / "tiny", tmp_path / "tiny")
    # Whatever is tried has collapsed then; nothing takes its place.
    strict = ("--set", "fusion.collapse_nats=1e-9", "--set", "fusion.restarts=0")
    assert molora("coop", "amend", cooperative, *strict).code == 0
    own = open_cooperative(cooperative).charter.amendment.fusion.router
    before = hash_files(cooperative)
    out = tmp_path / "out"
    ran = molora("fuse", "--cooperative", cooperative, "--out", out, "--router", "linear")
    assert ran.code == 0, ran.err
    assert f"router '{own}' stays the charter's, nothing is published or recorded" in ran.err
    assert hash_files(cooperative) == before
    assert json.loads((out / "fused" / "fused.json").read_text())["router"]["name"] == "linear"
    tried = json.loads((out / "result.json").read_text())
    assert tried["guard"]["linear"]["collapsed"] and "linear" in tried["losses"]["fused"]
    published = json.loads((fused / "out" / "result.json").read_text())
    assert tried["losses"]["fused"][own] == published["losses"]["fused"][own]


def test_a_router_that_cannot_be_tried_is_refused_in_one_line(molora, setup, fused):
    common = ("fuse", "--cooperative", fused / "tiny")
    chosen = open_cooperative(fused / "tiny").charter.amendment.fusion.router
    own = molora(*common, "--router", chosen)
    assert own.code == 10 and "expected another one than the charter's" in own.err
    unknown = molora(*common, "--router", "evidense")
    assert unknown.code == 61 and "Did you mean 'evidence'" in unknown.err
    given = molora(*common, setup.trained["abc"], "--router", "linear")
    assert given.code == 10 and "`molora coop admit`" in given.err
    assert not (fused / "tiny" / "tried").exists()
