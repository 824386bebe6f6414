"""A fusion on texts that stay with their owners, over the mailboxes."""

import json

import pytest
from stage_helpers import TRAINING, Stage

from molora_fed.charter import Amendment, FusionRules, PrivacyRules, SampleRules
from molora_fed.errors import SumError
from molora_fed.federation import coordinator
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.withdrawal import withdraw_contributor
from molora_fed.fusion.claims import Claim
from molora_fed.fusion.private_answers import FusionMember
from molora_fed.privacy.sums.coordinator import Coordinator

RULES = FusionRules(router="evidence", compare=("evidence-zero",), merges=())
SAMPLES = SampleRules(calibration=60, admission=4, held_out=60)
PHASES = ("keys", "shares", "masked", "agreement", "revealed")
TRIO = ("alpha", "beta", "gamma")


def build_stage(root, checkpoint, summing="masked", expected=3, rules=RULES):
    privacy = PrivacyRules(mode="private", summing=summing)
    amendment = Amendment(expected=expected, training=TRAINING, fusion=rules, samples=SAMPLES)
    return Stage(root, checkpoint, amendment, privacy=privacy)


def read_report(root):
    return json.loads((root / "server" / "report" / "report.json").read_text())


@pytest.mark.processes
@pytest.mark.parametrize("summing", ["masked", "robust"])
def test_a_federation_fuses_texts_that_stay_with_their_owners(tmp_path, tiny_checkpoint, summing):
    stage = build_stage(tmp_path, tiny_checkpoint("gpt_neox"), summing)
    stage.run(*TRIO)
    report = read_report(tmp_path)
    assert report["privacy_mode"] == "private"
    assert report["sums"]["members"] == {"alpha": 1, "beta": 1, "gamma": 1}
    for domain in TRIO:
        home = ContributorHome(tmp_path / domain)
        assert (home.result / "fused" / "router.safetensors").is_file()
    assert not list((tmp_path / "server" / "private" / "answers").glob("*/*"))


@pytest.mark.processes
def test_members_with_shortlists_vouch_for_adapters_and_say_what_was_lost(
    tmp_path, tiny_checkpoint
):
    rules = RULES.model_copy(update={"shortlist": 2})
    stage = build_stage(tmp_path, tiny_checkpoint("gpt_neox"), rules=rules)
    stage.run(*TRIO)
    report = read_report(tmp_path)
    found = report["sums"]["shortlist"]
    assert (found["experts"], found["of"]) == (2, 4)
    assert found["cost_nats"].keys() == {"evidence", "evidence-zero"}
    assert found["block_passes"]["shortlist"] < found["block_passes"]["all"]
    # Whoever measures another's adapter runs it, on its shortlist or not.
    claims = [one for said in report["claims"].values() for one in said.values()]
    assert claims and all(one["loss"] != one["base"] for one in claims)
    assert "Each member measured 2 of 4 experts" in (
        tmp_path / "server" / "report" / "report.html"
    ).read_text(encoding="utf-8")


@pytest.mark.processes
@pytest.mark.parametrize("phase", PHASES)
def test_who_drops_out_of_a_masked_sum_is_done_without(
    tmp_path, tiny_checkpoint, monkeypatch, phase
):
    """In the second sum, at each phase: two thirds of the members are enough to go on."""
    stage = build_stage(tmp_path, tiny_checkpoint("gpt_neox"), expected=4)
    begun = []
    advance, begin = Coordinator.advance, Coordinator.begin

    def note(terms):
        begun.append("keys")
        return begin(terms)

    def step(self):
        found = advance(self)
        begun.append(self.state.phase)
        return found

    monkeypatch.setattr(Coordinator, "begin", staticmethod(note))
    monkeypatch.setattr(Coordinator, "advance", step)
    monkeypatch.setattr(coordinator, "measure_absence", lambda box: 1e9 * (box.name in stage.away))

    def meddle(stage, who):
        if begun.count("keys") >= 2 and begun[-1] == phase:
            stage.away.add("alpha-b")
        return who not in stage.away

    stage.run("alpha", "alpha-b", "beta", "gamma", meddle=meddle)
    assert read_report(tmp_path)["sums"]["members"] == {"alpha": 1, "beta": 1, "gamma": 1}


def test_a_member_that_declines_is_done_without_while_it_is_here(
    tmp_path, tiny_checkpoint, monkeypatch
):
    measure, said = FusionMember.measure, set()

    def decline(self, question, rounds, **more):
        if self._own.contributor == "alpha-b":
            raise SumError("Cannot sum its 3 documents.")
        return measure(self, question, rounds, **more)

    def meddle(stage, who):
        said.add(stage.server.read_state().get("message", ""))
        return who not in stage.away

    monkeypatch.setattr(FusionMember, "measure", decline)
    stage = build_stage(tmp_path, tiny_checkpoint("gpt_neox"), "robust")
    stage.run("alpha-a", "alpha-b", "beta", meddle=meddle)
    assert read_report(tmp_path)["sums"]["members"] == {"alpha": 1, "beta": 1}
    assert not any("3 documents" in one for one in said)  # a figure of its text stays at home
    assert "3 documents" in ContributorHome(tmp_path / "alpha-b").read_refusals()[-1]


def lie(monkeypatch, who, part):
    """Let a member's sums be absurd, within their bounds."""
    measure = FusionMember.measure

    def measure_wrongly(self, question, rounds, **more):
        found = measure(self, question, rounds, **more)
        if self._own.contributor == who and part in found:
            found[part] = found[part] * 0 + 7e5
        return found

    monkeypatch.setattr(FusionMember, "measure", measure_wrongly)


@pytest.mark.processes
def test_an_absurd_sum_is_narrowed_down_to_a_group_that_is_left_out(
    tmp_path, tiny_checkpoint, monkeypatch
):
    lie(monkeypatch, "alpha-c", "alone.x")
    stage = build_stage(tmp_path, tiny_checkpoint("gpt_neox"), expected=6)
    stage.run("alpha-a", "alpha-b", "alpha-c", "alpha-d", "beta-a", "beta-b")
    members = read_report(tmp_path)["sums"]["members"]
    assert members == {"alpha": 1, "beta": 2}  # of three, one lied, and nobody knows who


@pytest.mark.processes
def test_an_absurd_sum_of_three_ends_in_one_line(tmp_path, tiny_checkpoint, monkeypatch):
    lie(monkeypatch, "beta-1", "alone.x")
    stage = build_stage(tmp_path, tiny_checkpoint("gpt_neox"))

    def meddle(stage, who):
        if "without whom a domain is lost" in stage.server.read_state().get("message", ""):
            stage.away |= set(TRIO)
        return True

    stage.run(*TRIO, meddle=meddle)
    message = stage.server.read_state()["message"]
    assert "alpha-1, beta-1, gamma-1" in message and "\n" not in message


@pytest.mark.processes
def test_a_robust_sum_refuses_an_absurd_vector_by_name(tmp_path, tiny_checkpoint, monkeypatch):
    lie(monkeypatch, "beta-1", "alone.x")
    stage = build_stage(tmp_path, tiny_checkpoint("gpt_neox"), "robust")

    def meddle(stage, who):
        if "answer of 'beta-1'" in stage.server.worker_board.read():
            stage.away |= set(TRIO)
        return True

    stage.run(*TRIO, meddle=meddle)
    assert "beta-1" in stage.server.worker_board.read()


def test_a_masked_fusion_waits_for_three_members(tmp_path, tiny_checkpoint):
    stage = build_stage(tmp_path, tiny_checkpoint("gpt_neox"), expected=2)

    def meddle(stage, who):
        if "2 of 3 contributions" in stage.server.read_state().get("message", ""):
            stage.away |= {"alpha", "beta"}
        return True

    stage.run("alpha", "beta", meddle=meddle)
    assert stage.away and not (tmp_path / "server" / "report").exists()


def test_an_adapter_that_two_members_disagree_with_is_quarantined(
    tmp_path, tiny_checkpoint, monkeypatch
):
    count = FusionMember.count

    def disagree(self, measured=(), **more):
        counts = count(self, measured, **more)
        worse = {"alpha-c": Claim(base=3.0, loss=4.0, clusters=9)} if "alpha-c" in measured else {}
        return counts.model_copy(update={"claims": {**counts.claims, **worse}})

    monkeypatch.setattr(FusionMember, "count", disagree)
    stage = build_stage(tmp_path, tiny_checkpoint("gpt_neox"), "robust")
    stage.run("alpha-a", "alpha-b", "alpha-c", meddle=lambda stage, who: who not in stage.away)
    assert "4.000 against 3.000 nats by 'alpha-b'" in stage.refused["alpha-c"]
    report = read_report(tmp_path)
    assert report["sums"]["members"] == {"alpha": 2}
    assert "'alpha-a'" in report["not_measured"]["contribution"]["alpha-c"]
    assert set(report["claims"]["alpha-a"]) == {"alpha-b"}


@pytest.mark.processes
@pytest.mark.parametrize("summing", ["masked", "robust"])
def test_a_private_cooperative_grows_and_shrinks_back(tmp_path, tiny_checkpoint, summing):
    """Nobody retrains; the fusion of who was in before is not asked for again."""
    stage = build_stage(tmp_path, tiny_checkpoint("gpt_neox"), summing)
    stage.run(*TRIO)
    first = (tmp_path / "server" / "fused" / "router.safetensors").read_bytes()
    offers = [ContributorHome(tmp_path / who).offer_file.read_bytes() for who in TRIO]
    secrets = list((tmp_path / "alpha" / "private" / "fusion").rglob("secret"))
    assert not secrets

    stage.run(*TRIO, "delta")
    assert read_report(tmp_path)["sums"]["members"] == dict.fromkeys(
        ["alpha", "beta", "delta", "gamma"], 1
    )
    assert [ContributorHome(tmp_path / who).offer_file.read_bytes() for who in TRIO] == offers

    withdraw_contributor(stage.cooperative, "delta-1")
    stage.away.add("delta")
    stage.run(*TRIO)
    assert (tmp_path / "server" / "fused" / "router.safetensors").read_bytes() == first
