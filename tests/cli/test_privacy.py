"""Modes of privacy on the command line: chosen once, shown wherever one looks."""

import shutil

import pytest

from molora_fed.charter import load_charter
from molora_fed.contributions.receive import build_receipt
from molora_fed.contributions.states import ContributionState
from molora_fed.cooperative.cooperative import open_cooperative
from molora_fed.options import name_choices


@pytest.fixture
def create(molora, tmp_path, tiny_checkpoint):
    """`create("--privacy", "private")`: what `molora coop create` did, and the folder."""

    def call(*options):
        folder = tmp_path / "coop"
        command = ("coop", "create", "c", "--base", tiny_checkpoint(), "--folder", folder)
        return molora(*command, "--block-size", "32", "--domains", "abc,xyz", *options), folder

    return call


@pytest.mark.parametrize(
    ("options", "mode", "summing", "words"),
    [
        (("--privacy", "pooled"), "pooled", "masked", "pooled: samples of text"),
        ((), "private", "masked", "totals of sums over three members"),
        (
            ("--summing", "robust"),
            "private",
            "robust",
            "each member's sums",
        ),
        (
            ("--privacy", "statistics", "--summing", "robust"),
            "statistics",
            "robust",
            "statistics of hidden states are published with adapters",
        ),
    ],
)
def test_a_mode_is_chosen_and_shown(molora, create, options, mode, summing, words):
    ran, folder = create(*options)
    assert ran.code == 0, ran.err
    identity = load_charter(folder).identity
    assert (identity.privacy_mode, identity.summing) == (mode, summing)
    for shown in (ran.out, molora("status", folder).out, molora("doctor", folder).out):
        (line,) = [line for line in shown.splitlines() if "privacy" in line]
        assert words in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--privacy", "secret"),
            "expected --privacy pooled or private or statistics, got 'secret'",
        ),
        (("--privacy", "private", "--summing", "plain"), "expected --summing masked or robust"),
        (("--privacy", "pooled", "--summing", "robust"), "expected --summing with --privacy"),
    ],
)
def test_a_wrong_mode_is_one_line_and_makes_nothing(create, options, words):
    ran, folder = create(*options)
    assert ran.code == 10 and not folder.exists()
    (line,) = ran.err.splitlines()
    assert words in line


def test_a_router_of_published_statistics_is_chosen_and_another_one_refused(create):
    ran, folder = create("--privacy", "statistics", "--router", "evidence")
    assert ran.code == 11 and not folder.exists()
    (line,) = ran.err.splitlines()
    assert "expected a router that is made from published statistics" in line
    assert "got 'evidence'" in line
    ran, folder = create("--privacy", "statistics")
    assert ran.code == 0, ran.err
    fusion = load_charter(folder).amendment.fusion
    assert (fusion.router, fusion.compare) == ("statistics", name_choices("evidence-zero"))


def test_that_masked_sums_wait_for_a_third_is_said(create):
    for rules, words in (
        ((), "waits for 3 contributions, not 2"), (("--summing", "robust"), ""),
        (("--privacy", "pooled"), ""),
    ):  # fmt: skip
        ran, folder = create("--expected", "2", *rules)
        assert ran.code == 0 and words in ran.err and bool(ran.err) == bool(words)
        shutil.rmtree(folder)


def test_what_train_made_is_listed_with_the_sums_to_come(molora, create, setup, tmp_path):
    ran, folder = create("--steps", "4", "--kind", "lora", "--rank", "4")
    assert ran.code == 0, ran.err
    command = ("train", "--cooperative", folder, "--domain", "abc", "--out", tmp_path / "out")
    trained = molora(*command, "--data", setup.texts["abc"], "--threads", "1")
    assert trained.code == 0, trained.err
    assert "sample" not in trained.out
    assert "masked sums, losses and gates, held-out text" in trained.out
    assert "What can be told from it" in trained.out and "Your sums are masked" in trained.out
    shutil.rmtree(tmp_path / "out")


def test_newcomers_without_a_sample_are_measured_on_public_text(molora, create, setup, tmp_path):
    _, folder = create("--steps", "12", "--kind", "lora", "--rank", "4")
    command = ("train", "--cooperative", folder, "--domain", "abc", "--out", tmp_path / "out")
    trained = molora(*command, "--data", setup.texts["abc"], "--threads", "1", "--name", "abc-1")
    assert trained.code == 0, trained.err
    text = ("coop", "text", folder, "--domain")
    for domain, data, words in (
        ("../abc", setup.texts["abc"], "expected lower-case letters"),
        ("abc", tmp_path / "nowhere", "nowhere"),
        ("nobodys", None, "nobodys"),
    ):
        refused = molora(*text, domain, *(() if data is None else ("--data", data)))
        assert refused.code and words in refused.err and refused.err.count("\n") == 1
    (tmp_path / "short.txt").write_text("A short text.")
    refused = molora(*text, "abc", "--data", tmp_path / "short.txt")
    assert "at least 8 blocks of 32 tokens" in refused.err and not (folder / "public").exists()

    # Text of another kind, on which the adapter is worse than the base: a person decides.
    (tmp_path / "other.txt").write_text("#%&@!+" * 400)
    assert molora(*text, "abc", "--data", tmp_path / "other.txt").code == 0
    assert molora("coop", "amend", folder, "--set", "admission.max_loss_rise=0").code == 0
    held = molora("coop", "admit", folder, tmp_path / "out")
    assert held.code and "QUARANTINED" in held.out
    assert "on the coordinator's public text of 'abc'" in held.err
    assert molora(*text, "abc", "--data", setup.texts["abc"]).code == 0
    released = molora("coop", "release", folder, "abc-1")
    assert released.code == 0, released.err
    with open_cooperative(folder).read_ledger() as ledger:
        (entry,) = ledger.contributions(ContributionState.ADMITTED)
        losses = build_receipt(ledger, entry, known=True).decision.losses
    assert losses.specialist < losses.base
