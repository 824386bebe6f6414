"""Adapters made elsewhere, contributed and joined with: the same numbers, and true provenance."""

import json
import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from adapter_folders import CASES, TOLERANCE, edit, make, peft_logits, quiet, train_with_peft
from safetensors.torch import load_file, save_file

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.files import META_FILE, WEIGHTS_FILE, load_adapter
from molora_fed.charter import Amendment, CorpusRules, PrivacyRules, SampleRules, TrainingRules
from molora_fed.contributions.admission import AdmissionCandidate, admit
from molora_fed.contributions.manifest import load_contribution
from molora_fed.contributions.states import ContributionState
from molora_fed.cooperative.chat_tokens import find_chat_warnings
from molora_fed.cooperative.contribute import (
    make_contribution,
    open_charter_and_base,
    prepare_domain,
)
from molora_fed.cooperative.cooperative import create_cooperative
from molora_fed.errors import AdapterError
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.models.base import load_base
from molora_fed.plugins import load_plugins
from molora_fed.storage.keys import load_or_make_key
from molora_fed.testing.models import build_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

READ = [case for case in CASES if not case.refused]
REFUSED = [case for case in CASES if case.refused]


def name_of(case):
    return f"{case.made_by}: {case.name}"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Text that a tiny model learns in a few steps: letters doubled."""
    draw = random.Random(0)
    folder = tmp_path_factory.mktemp("texts")
    for number in range(240):
        words = (draw.choice("abcd") * 2 + str(draw.randrange(10)) for _ in range(12))
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="module")
def cooperative(tmp_path_factory, tiny_checkpoint, texts):
    """`cooperative(architecture)`: charter and base, and a prepared corpus."""

    @cache
    def found(architecture):
        folder = tmp_path_factory.mktemp(architecture)
        create_cooperative(
            folder / "coop", "test", load_base(tiny_checkpoint(architecture)),
            corpus=CorpusRules(block_size=16), privacy=PrivacyRules(mode="pooled"),
            amendment=Amendment(
                training=TrainingRules(kind="lora", rank=2, steps=4, batch=4, validate_every=2),
                samples=SampleRules(calibration=8, admission=8, held_out=8),
            ),
        )  # fmt: skip
        under = open_charter_and_base(folder / "coop")
        return under, prepare_domain(under, "mine", [texts], folder)

    return found


@pytest.fixture
def contribute(cooperative, tmp_path):
    """`contribute(folder)`: what `molora contribute --adapter` and `molora join --adapter` make."""

    def run(given, architecture="llama", **more):
        under, corpus = cooperative(architecture)
        key = load_or_make_key(tmp_path / "key.pem")
        return make_contribution(under, corpus, tmp_path / "out", key=key, given=given, **more)

    return run


@pytest.mark.parametrize("case", READ, ids=name_of)
def test_a_contribution_holds_the_same_numbers(case, contribute, cooperative, tmp_path, tokens):
    with quiet():
        original = case.build(tmp_path / "a") or tmp_path / "a"
    JoinSettings("me", "mine", (tmp_path,), adapter=tmp_path / "a").check_adapter()
    made = contribute(tmp_path / "a", case.architecture)
    manifest = load_contribution(tmp_path / "out" / "contribution").manifest
    assert manifest.origin is not None and manifest.origin.verified == "shapes"
    assert (made.adapter.changed, manifest.start_loss) == (made.adapter.modules, None)
    assert "home" not in manifest.origin.base and "u01" not in json.dumps(manifest.origin.base)
    folder = made.contribution.adapter_folder
    assert (folder / META_FILE).exists()
    under, _ = cooperative(case.architecture)
    model = under.base.model
    adapter = load_adapter(folder, rules=under.charter.identity.adapters)
    with applied(model, adapter), torch.no_grad():
        found = model(tokens).logits
    assert torch.allclose(found, peft_logits(case.architecture, original, tokens), atol=TOLERANCE)


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_a_refused_folder_makes_no_contribution(case, contribute, tmp_path):
    with quiet():
        case.build(tmp_path / "a")
    with pytest.raises(AdapterError) as caught:
        contribute(tmp_path / "a", case.architecture)
    assert "\n" not in str(caught.value)
    if "link" not in case.name:  # links are refused before
        assert case.refused in str(caught.value) and case.repair in str(caught.value)
    assert not (tmp_path / "out" / "contribution").exists()
    if not (case.late or case.needs_base):  # told before the server is asked for anything
        with pytest.raises(AdapterError):
            JoinSettings("me", "mine", (tmp_path,), adapter=tmp_path / "a").check_adapter()


@pytest.fixture
def judge(cooperative):
    def run(contribution, architecture="llama"):
        under, _ = cooperative(architecture)
        return admit(AdmissionCandidate(contribution, under.charter, under.base, load_plugins()))

    return run


def train_tokens(corpus):
    from molora_fed.types import Split

    return torch.as_tensor(corpus.blocks[Split.TRAIN].tokens).long()


def test_a_foreign_adapter_trained_on_this_base_is_admitted(
    contribute, cooperative, judge, tmp_path
):
    _, corpus = cooperative("llama")
    train_with_peft(tmp_path / "a", build_tiny_model("llama"), train_tokens(corpus))
    made = contribute(tmp_path / "a")
    decision = judge(made.contribution)
    assert decision.state == ContributionState.ADMITTED, decision.refusals
    assert "claimed-base" in decision.checks and decision.notes == ()


def test_a_base_of_the_same_shape_is_held_back_with_that_reason(
    contribute, cooperative, judge, tmp_path
):
    _, corpus = cooperative("llama")
    train_with_peft(tmp_path / "a", build_tiny_model("llama", seed=1), train_tokens(corpus))
    edit(tmp_path / "a", base_model_name_or_path="someone/llama-instruct", revision="main")
    made = contribute(tmp_path / "a")
    decision = judge(made.contribution)
    assert decision.state in (ContributionState.QUARANTINED, ContributionState.REJECTED)
    found = next(r for r in decision.refusals if r.check == "claimed-base")
    assert "only its shapes fit" in found.expected
    assert "'someone/llama-instruct main'" in found.found


def test_a_base_in_four_bits_is_named_and_not_refused(contribute, cooperative, judge, tmp_path):
    _, corpus = cooperative("llama")
    train_with_peft(tmp_path / "a", build_tiny_model("llama"), train_tokens(corpus))
    edit(tmp_path / "a", base_model_name_or_path="unsloth/llama-bnb-4bit")
    decision = judge(contribute(tmp_path / "a").contribution)
    assert decision.state == ContributionState.ADMITTED
    assert len(decision.notes) == 1 and "'unsloth/llama-bnb-4bit'" in decision.notes[0]
    assert type(decision).from_json(decision.to_json()) == decision


def test_an_adapter_trained_here_states_no_origin(contribute, cooperative, tmp_path):
    under, corpus = cooperative("llama")
    key = load_or_make_key(tmp_path / "key.pem")
    made = make_contribution(under, corpus, tmp_path / "own", key=key)
    manifest = made.contribution.manifest
    assert manifest.origin is None and b'"origin"' not in manifest.canonical
    again = contribute(tmp_path / "own")
    assert again.contribution.manifest.origin is None
    assert again.contribution.manifest.adapter_files == manifest.adapter_files


def test_an_adapter_that_changes_nothing_is_refused_by_admission(
    contribute, judge, cooperative, tmp_path
):
    under, corpus = cooperative("llama")
    key = load_or_make_key(tmp_path / "key.pem")
    made = make_contribution(under, corpus, tmp_path / "own", key=key)
    folder = made.contribution.adapter_folder
    tensors = {k: t.clone() * 0 for k, t in load_file(folder / WEIGHTS_FILE).items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    decision = judge(replace(made.contribution))
    layout = next(r for r in decision.refusals if r.check == "tensor-layout")
    assert "changes 0 of 14 modules" in layout.found


def test_chat_tokens_that_the_base_never_trained_are_warned_of(tiny_checkpoint, tmp_path):
    base = load_base(tiny_checkpoint("llama"))
    assert find_chat_warnings(base) == []
    base.tokenizer.chat_template = "{{ messages }}<|endoftext|>"
    assert find_chat_warnings(base) == []
    with torch.no_grad():
        weight = base.model.get_input_embeddings().weight
        row = weight[256].clone()
        for value, reason in ((0, "zero"), (weight.mean(0), "mean"), (weight[3], "another")):
            weight[256] = value
            (line,) = find_chat_warnings(base)
            assert "'<|endoftext|>'" in line and reason in line and "\n" not in line
        weight[256] = row


def test_another_chat_template_is_warned_of(tiny_checkpoint, contribute, tmp_path):
    base = load_base(tiny_checkpoint("llama"))
    make(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("<|im_start|>{{ x }}")
    (line,) = find_chat_warnings(base, tmp_path / "a")
    assert "a chat template, the base none" in line
    (tmp_path / "a" / "chat_template.jinja").unlink()
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps({"chat_template": "other"}))
    base.tokenizer.chat_template = "own"
    (line,) = find_chat_warnings(base, tmp_path / "a")
    assert "another chat template" in line
    heard = []
    contribute(tmp_path / "a", on_warning=heard.append)
    assert len(heard) == 1
