"""A fusion whose routers are made from published statistics, from contribution to report."""

import json

import pytest
import torch
from stage_helpers import PLUGINS, TRAINING, Stage, plant, write_shared

from molora_fed.charter import Amendment, FusionRules, PrivacyRules, SampleRules
from molora_fed.contributions.manifest import load_contribution
from molora_fed.cooperative.outgoing import describe_outgoing, read_width
from molora_fed.federation.envelopes import open_letter
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.letters import AnswerLetter, QuestionLetter
from molora_fed.federation.sent import count_sent
from molora_fed.federation.worker_mail import find_base_config

TRIO = ("alpha", "beta", "gamma")
RULES = FusionRules(router="statistics", compare=("evidence-zero",), merges=())
SAMPLES = SampleRules(calibration=60, admission=4, held_out=60)


def build_stage(root, checkpoint, summing="masked", **settings):
    privacy = PrivacyRules(mode="statistics", summing=summing)
    amendment = Amendment(
        expected=3, domains=TRIO, training=TRAINING, fusion=RULES, samples=SAMPLES
    )
    return Stage(root, checkpoint, amendment, privacy=privacy, **settings)


def read_report(root):
    return json.loads((root / "server" / "report" / "report.json").read_text())


def find_place(home):
    """Place of the question that lies in a home, and its content; "" if it holds none."""
    letter = open_letter(home.question_letter, QuestionLetter)
    path = None if letter is None else home.question_folder(letter.id) / "question.json"
    if path is None or not path.is_file():
        return "", {}
    content = json.loads(path.read_text())
    return content.get("place", content["kind"]), content


@pytest.mark.processes
def test_a_federation_routes_by_published_statistics(tmp_path, tiny_checkpoint):
    stage = build_stage(tmp_path, tiny_checkpoint("gpt_neox"), block_size=64)
    # No held-out figure may be of what somebody else trained on.
    write_shared(tmp_path, TRIO)
    places = set()
    stage.run(
        *TRIO, watch=lambda homes, steps: places.update(find_place(h)[0] for h in homes.values())
    )
    assert places - {"", "phase"} <= {"experts", "losses", "held-out"}
    report = read_report(tmp_path)
    assert report["privacy_mode"] == "statistics" and report["router"] == "statistics"
    assert report["sums"]["members"] == {"alpha": 1, "beta": 1, "gamma": 1}
    check_left_out(report)
    for domain in TRIO:
        home = ContributorHome(tmp_path / domain)
        assert (home.result / "fused" / "router.safetensors").is_file()
        check_sent(stage, home)


def check_left_out(report):
    """Replies about held-out text come beside the held-out question, and count in its answer."""
    overlap, size = report["overlap"], 63
    assert overlap["compared"]["train"] == sorted(f"{name}-1" for name in TRIO)
    assert "not_compared" not in overlap
    alpha = overlap["domains"]["alpha"]
    assert 0 < alpha["left_out"] < alpha["blocks"]
    kept = {d: own["blocks"] - own["left_out"] for d, own in overlap["domains"].items()}
    assert report["sums"]["tokens"] == {domain: size * count for domain, count in kept.items()}


def check_sent(stage, home):
    """Statistics were sent once, as listed, and what they were measured from is gone."""
    made = load_contribution(home.contribution)
    width = read_width(find_base_config(home))
    for source, is_exact in ((None, False), (made.manifest, True)):
        rows = describe_outgoing(
            stage.cooperative.charter, PLUGINS, manifest=source, width=width
        ).rows
        (row,) = [row for row in rows if row.what.startswith("statistics")]
        assert row.exact == is_exact and row.times == 1
        assert made.manifest.statistics_file.bytes <= row.bytes
        assert row.numbers == 1 + width + width * (width + 1) // 2
    sent = count_sent(home)["statistics"]
    assert sent == {"messages": 1, "bytes": made.manifest.statistics_file.bytes}
    assert not (home.root / "statistics").exists()


@pytest.mark.parametrize("place", ["fit 0 0", "judge 0"])
def test_a_member_refuses_a_fit_and_a_guard_and_answers_on(tmp_path, tiny_checkpoint, place):
    stage = build_stage(tmp_path, tiny_checkpoint("gpt_neox"), "robust")
    refused = []

    def meddle(homes, steps):
        home = homes["alpha"]
        at, content = find_place(home)
        answered = open_letter(home.answer_file, AnswerLetter)
        asked = open_letter(home.question_letter, QuestionLetter)
        if refused or at != "losses" or answered is None or answered.question != asked.id:
            return
        hostile = {**content, "place": place, "routers": ["statistics"]}
        refused.append(plant(stage, home, hostile, {"statistics/x": torch.zeros(1)}))
        next(steps["alpha"])
        assert home.read_state()["message"].startswith("refused a question: Cannot")
        assert not home.answer_folder(refused[0]).exists()

    stage.run(*TRIO, watch=meddle)
    (line,) = ContributorHome(tmp_path / "alpha").refusals_log.read_text().splitlines()
    note = json.loads(line)
    assert note["question"] == refused[0]
    assert f"Cannot answer '{place}': expected a place of a fusion under" in note["reason"]
    assert read_report(tmp_path)["sums"]["members"] == {"alpha": 1, "beta": 1, "gamma": 1}
