"""A coordinator that asks members of a private fusion for more than they agreed to."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from molora_cli.main import run
from safetensors.torch import load_file
from stage_helpers import TRAINING, Stage, plant

from molora_fed.charter import Amendment, FusionRules, PrivacyRules, SampleRules
from molora_fed.contributions.manifest import load_contribution
from molora_fed.cooperative.outgoing import describe_outgoing, read_width
from molora_fed.errors import FederationError, QuestionRefusedError
from molora_fed.federation.client_dialogue import answer
from molora_fed.federation.consent import (
    give_consent,
    has_consent,
)
from molora_fed.federation.contributor import ContributorSupervisor
from molora_fed.federation.doctor import examine
from molora_fed.federation.envelopes import Envelope, keep_letter, open_letter
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.letters import AnswerLetter, QuestionLetter, ShownState
from molora_fed.federation.overview import describe_contributor, read_contributor
from molora_fed.federation.server_dialogue import RemoteContributor
from molora_fed.federation.sum_answers import SumAnswers
from molora_fed.federation.sum_letters import ExpertsAsked, save_experts
from molora_fed.federation.worker_mail import (
    find_base_config,
    is_described,
    receive_charter,
)
from molora_fed.fusion.sum_questions import name_fusion
from molora_fed.plugins import load_plugins
from molora_fed.storage.files import write_json
from molora_fed.storage.keys import load_key, load_or_make_key
from molora_fed.storage.options import Choice, name_choices

pytestmark = pytest.mark.processes

PLUGINS = load_plugins()
RULES = FusionRules(router="evidence", compare=("evidence-zero",), merges=(), restarts=1)
AMENDMENT = Amendment(
    expected=3, training=TRAINING, fusion=RULES, domains=("alpha", "beta", "gamma"),
    samples=SampleRules(calibration=60, admission=4, held_out=60),
)  # fmt: skip


def build_stage(root, checkpoint, summing):
    privacy = PrivacyRules(mode="private", summing=summing)
    return Stage(root, checkpoint, AMENDMENT, privacy=privacy)


def list_hostile(asked, state):
    """Questions that no charter allows for: their name, content and state, and words of why not."""
    many = {name: t.repeat(50, *[1] * (t.dim() - 1)) for name, t in state.items()}
    counts = json.loads(json.dumps(asked["counts"]))
    counts["beta-1"]["tokens"] = 10**9
    return {
        "text": ({"kind": "text", "fusion": asked["fusion"]}, None, "Cannot read a question"),
        "a sample": ({"kind": "sample", "split": "calibration"}, None, "Cannot read a question"),
        "an evolution's": ({"kind": "gates", "settings": {}}, None, "Cannot read a question"),
        "no JSON object": ([], None, "Cannot read a question"),
        "another place": ({**asked, "place": "train 0"}, state, "place"),
        "a place beyond the charter": ({**asked, "place": "fit 7 0"}, state, "a place of a fusion"),
        "one more for the same place": (
            asked, {n: t + 0.5 for n, t in state.items()}, "one more of 'fit 0 0'",
        ),
        "more numbers": (asked, many, "numbers, as the charter says"),
        "an unknown router": ({**asked, "routers": ["dispatch"]}, state, "'dispatch'"),
        "states of nothing": (asked, {}, "states that fit"),
        "no state": (asked, None, "Cannot read tensors"),
        "odd numbers": (
            asked, {n: t.to(torch.float8_e4m3fn) for n, t in state.items()}, "finite floating",
        ),
        "others' counts": ({**asked, "counts": counts}, state, "got others for beta-1"),
        "another fusion": ({**asked, "fusion": "0" * 64}, state, "whose experts are here"),
        "a sum that nobody began": (
            {"kind": "phase", "fusion": asked["fusion"], "question": "1" * 64, "attempt": 0},
            None, "begun here",
        ),
        "experts of nobody": ({"kind": "experts", "fusion": asked["fusion"]}, None, "0"),
    }  # fmt: skip


class Attack:
    """Plants hostile questions once the first real sum was answered, and weighs all answers."""

    def __init__(self, stage):
        self.stage = stage
        self.home = None
        self.planted = {}
        self.sizes = {}

    def __call__(self, homes, steps):
        home = self.home = homes["alpha"]
        asked = open_letter(home.question_letter, QuestionLetter)
        answered = open_letter(home.answer_file, AnswerLetter)
        if asked is None or answered is None or asked.id != answered.question:
            return
        folder = home.question_folder(asked.id)
        if not folder.is_dir():
            return  # forgotten over the planted ones; answered all the same
        content = json.loads((folder / "question.json").read_text())
        place = content.get("place", content["kind"])
        if content["kind"] == "phase":
            place = "keys" if not place_is_masked(home, asked.id) else "masked"
        files = [one for one in answered.files.files if not one.name.startswith("overlap/")]
        self.sizes.setdefault(place, []).append(sum(one.num_bytes for one in files))
        if content["kind"] != "sum" or self.planted or "alpha" not in steps:
            return
        state = load_file(folder / "state.safetensors")
        for name, (other, tensors, words) in list_hostile(content, state).items():
            question = plant(self.stage, home, other, tensors)
            next(steps["alpha"])
            next(steps["alpha"])  # looked at once more, refused once
            self.planted[name] = question
            (line,) = [
                json.loads(line)
                for line in home.refusals_log.read_text().splitlines()
                if question in line
            ]
            assert words in line["reason"], (name, line["reason"])
            assert "\n" not in line["reason"] and str(home.root) not in line["said"]
            assert not home.answer_folder(question).exists()
            assert home.read_state()["message"].startswith("refused a question: Cannot")
            self.check_shown(home, line["said"])

    def check_shown(self, home, said):
        """At the contributor, and at the coordinator from what the contributor says next."""
        (state,) = [x for x in answer(home, Envelope(())).letters if isinstance(x, ShownState)]
        assert state.problem.startswith("refused a question: Cannot") and state.problem.endswith(
            said[-40:]
        )
        (box,) = [one for one in self.stage.server.contributors() if one.name == "alpha-1"]
        keep_letter(box.state_file, ShownState(phase=state.phase, problem=state.problem))
        event = describe_contributor(box)
        assert event.problem and event.message == state.problem


def place_is_masked(home, question):
    """Whether the answer to a phase holds a masked vector."""
    data = (home.answer_folder(question) / "message.bin").read_bytes()
    return b'"phase":"masked"' in data.split(b"\n")[0]


@pytest.mark.parametrize("summing", ["masked", "robust"])
def test_what_goes_beyond_the_charter_is_refused_and_the_fusion_goes_on(
    tmp_path, tiny_checkpoint, summing
):
    stage = build_stage(tmp_path, tiny_checkpoint("gpt_neox"), summing)
    attack = Attack(stage)
    stage.run("alpha", "beta", "gamma", watch=attack)
    assert len(attack.planted) == 16
    assert (tmp_path / "server" / "report" / "report.json").is_file()
    home = attack.home
    seen = read_contributor(home)
    assert len(seen.refusals) == 8 and "1 to 1024 experts" in seen.refusals[-1]
    assert seen.privacy.startswith("private, sums ")
    found = {one.subject: one for one in examine(home, PLUGINS)}
    assert found["questions"].is_problem and "refused" in found["questions"].message
    check_sizes(stage, home, attack.sizes)

    check_going_back(stage, home, tmp_path)


def check_going_back(stage, home, root):
    """A fusion whose result has come is over: counted, deleted, and not begun again."""
    charter, own = stage.cooperative.charter, load_contribution(home.contribution)
    (place,) = home.private.glob("fusion/" + "[0-9a-f]" * 16)
    assert [path.name for path in place.iterdir()] == ["ended.json"]
    names = ("alpha", "beta", "gamma")
    experts = [load_contribution(ContributorHome(root / n).contribution) for n in names]
    answers = SumAnswers(
        charter, name="alpha-1", contribution=own.id, key=load_key(home.key),
        folder=home.private / "fusion", open_member=lambda entrants, folder: None,
    )  # fmt: skip
    fusion = name_fusion(charter, [one.id for one in experts])
    save_experts(ExpertsAsked(fusion=fusion), experts, root / "question")
    with pytest.raises(QuestionRefusedError, match="whose result is here"):
        answers.answer(root / "question", root / "answer", None)
    kept = json.loads((home.private / "fusion" / "asked" / fusion / "asked.json").read_text())
    assert {"fit 0 0", "judge 0", "held-out"} <= kept["asked"].keys()


def check_sizes(stage, home, sizes):
    """Nothing that was sent is larger than what was listed."""
    config = find_base_config(home)
    listed = describe_outgoing(stage.cooperative.charter, PLUGINS, width=read_width(config)).rows
    rows = {row.what.removeprefix("masked ").removeprefix("sums, "): row for row in listed}
    counts = rows["counts of your text: tokens, blocks, word 8-grams"]
    claims = next(row for what, row in rows.items() if what.startswith("losses of up to"))
    assert max(sizes["experts"]) <= counts.bytes + claims.bytes
    keys = [row.bytes for what, row in rows.items() if what.startswith("keys")]
    first = rows["fit of the routers, round 1 (and calibration losses)"]
    if keys:
        assert max(sizes["fit 0 0"] + sizes["keys"]) <= keys[0]
        assert first.bytes < max(sizes["masked"]) + 4_096
        assert max(sizes["masked"]) <= first.bytes + keys[0]
    else:
        assert first.bytes - 512 < max(sizes["fit 0 0"]) <= first.bytes
        assert max(sizes["held-out"]) <= rows["losses and gates, held-out text"].bytes


def test_another_signer_ends_nothing_and_another_amendment_asks_to_join_again(
    tmp_path, tiny_checkpoint
):
    stage = build_stage(tmp_path, tiny_checkpoint("gpt_neox"), "masked")
    seen = SimpleNamespace(done=False, refusals=[])

    def meddle(homes, steps):
        home = homes["alpha"]
        if seen.done or not home.acknowledgement_letter.exists() or "alpha" not in steps:
            return
        if home.read_state().get("phase") != "ADMITTED":
            return
        seen.done = True
        stranger = load_or_make_key(tmp_path / "stranger.pem")
        for _ in range(3):  # set aside, sent again
            plant(stage, home, {"kind": "text"}, key=stranger)
            next(steps["alpha"])
            assert not home.question_letter.exists()
        seen.refusals = home.read_refusals()
        plant(stage, home, {"kind": "text"}, amendment=1)
        with pytest.raises(FederationError, match="Run `molora join` again"):
            next(steps.pop("alpha"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.run("alpha", "beta", "gamma", watch=meddle)
    assert len(seen.refusals) == 1 and "ignature" in seen.refusals[0]
    assert not ContributorHome(tmp_path / "alpha").refused_file.exists()


SLOW = (Choice(name="evidence-zero", label="slow", options={"heat": 0.5}),)


def change(charter, **fusion):
    samples = fusion.pop("samples", charter.amendment.samples)
    rules = charter.amendment.fusion.model_copy(update=fusion)
    amendment = charter.amendment.model_copy(
        update={"number": 1, "fusion": rules, "samples": samples}
    )
    return charter.model_copy(update={"amendment": amendment})


def test_an_amendment_that_asks_for_more_asks_again(tmp_path, tiny_checkpoint):
    stage = build_stage(tmp_path, tiny_checkpoint("gpt_neox"), "masked")
    home, charter = stage.make("alpha"), stage.cooperative.charter
    assert not has_consent(home, charter)
    give_consent(home, charter)
    less = SampleRules(calibration=30, admission=4, held_out=60)
    more = SampleRules(calibration=61, admission=4, held_out=60)
    same = ({}, {"restarts": 0}, {"compare": ()}, {"samples": less}, {"collapse_nats": 1.0})
    assert all(has_consent(home, change(charter, **each)) for each in same)
    asked = (
        {"restarts": 2}, {"compare": name_choices("linear")}, {"merges": name_choices("average")},
        {"samples": more}, {"options": {"prior": False}}, {"mode": "population"}, {"shortlist": 3},
        {"compare": SLOW}, {"merges": (Choice(name="ties", options={"density": 0.2}),)},
    )  # fmt: skip
    assert not any(has_consent(home, change(charter, **each)) for each in asked)
    give_consent(home, change(charter, shortlist=3))
    assert has_consent(home, change(charter, shortlist=3))
    assert not has_consent(home, charter)  # which tells the losses of all experts
    give_consent(home, change(charter, compare=SLOW))
    assert has_consent(home, change(charter, compare=SLOW))
    other = (SLOW[0].model_copy(update={"options": {"heat": 0.1}}),)
    assert not has_consent(home, change(charter, compare=other))
    give_consent(home, charter)
    robust = charter.identity.model_copy(update={"summing": "robust"})
    assert not has_consent(home, charter.model_copy(update={"identity": robust}))
    # Whoever agreed when sums were not listed is asked again; nonsense agrees to nothing.
    for kept in ({"identity": charter.identity_hash, "samples": "private"}, [], {"sums": {}}):
        write_json(home.consent_file, kept)
        assert not has_consent(home, charter)


def test_consent_is_asked_for_once_the_base_says_how_many_sums_there_are(
    tmp_path, tiny_checkpoint, capsys
):
    stage = build_stage(tmp_path, tiny_checkpoint("gpt_neox"), "masked")
    home, line = stage.make("alpha"), RemoteContributor()
    asked = []
    supervisor = ContributorSupervisor(
        "127.0.0.1:1", home.root, home.read_settings(), lambda event: None, consent=asked.append
    )
    described = []
    for _ in range(20):
        envelope = stage.dialogue.next_envelope(line)
        parts = envelope.parts if described and not described[-1] else ()
        stage.dialogue.accept(line, answer(home, replace(envelope, parts=parts)))
        if receive_charter(home) is not None:
            described.append(is_described(home))
            if not described[-1]:
                supervisor._settle_consent()
        if described and described[-1]:
            break
    assert described[0] is False and described[-1] is True and not asked
    with pytest.raises(FederationError, match="expected consent to send what it asks for"):
        supervisor._settle_consent()
    assert asked == [stage.cooperative.charter] and not has_consent(home, asked[0])

    dry_run = ["join", "--server", "127.0.0.1:1", "--domain", "alpha", "--home", str(home.root)]
    assert run([*dry_run, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    width = read_width(find_base_config(home))
    for row in describe_outgoing(asked[0], PLUGINS, width=width).rows:
        assert row.what in shown and f"{row.bytes:,}" in shown
    assert "Privacy mode private, sums masked" in shown and "Nothing of text or adapter" in shown
    assert "members' own figures, in the total too, where fewer than 3" in shown
    assert not has_consent(home, asked[0])
