import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from molora_fed import Configurable, PluginOptions, hookimpl
from molora_fed.charter import AdapterRules, AdmissionRules, Amendment, SampleRules
from molora_fed.contributions.admission import (
    AdmissionCandidate,
    AdmissionDecision,
    Stage,
    admit,
    find_stage,
    needs,
)
from molora_fed.contributions.states import ContributionState
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import AdmissionError
from molora_fed.plugins import load_plugins
from molora_fed.storage.keys import sign
from molora_fed.types import Finding, Split

ALL = {
    "adapter-limits",
    "base-fingerprint",
    "carried-files",
    "charter-identity",
    "claimed-base",
    "finite-values",
    "frozen-depth",
    "near-copy",
    "other-domains",
    "own-domain-loss",
    "quantised-base",
    "required-samples",
    "shared-initialisation",
    "signature",
    "tensor-layout",
}
MANIFEST_CHECKS = (
    "carried-files",
    "charter-identity",
    "quantised-base",
    "required-samples",
    "signature",
)


@pytest.fixture
def judge(charter, base, plugins):
    """`judge(contribution, ...)`: what admission decides."""

    def run(contribution, accepted=(), **changes):
        arguments = {"charter": charter, "base": base, "plugins": plugins, **changes}
        return admit(AdmissionCandidate(contribution, **arguments), accepted=accepted)

    return run


@pytest.fixture
def resigned(contributor_key):
    """`resigned(contribution, **changes)`: another manifest, signed as its contributor could."""

    def change(contribution, **changes):
        manifest = contribution.manifest.model_copy(update=changes)
        signature = sign(contributor_key, manifest.canonical)
        return dataclasses.replace(contribution, manifest=manifest, signature=signature)

    return change


def expect(decision, check, expected, found):
    """The decision is a rejection by this check alone, with a message of the template."""
    assert decision.state == ContributionState.REJECTED
    assert [refusal.check for refusal in decision.refusals] == [check]
    message = decision.refusals[0].message
    head = f"Cannot admit contribution of 'legal-07', check '{check}': expected "
    assert message.startswith(head)
    assert "\n" not in message
    assert re.search(expected, decision.refusals[0].expected), message
    assert re.search(found, decision.refusals[0].found), message
    assert decision.refusals[0].fix.endswith(".")
    with pytest.raises(AdmissionError, match=re.escape(head)) as caught:
        decision.check_admitted()
    assert caught.value.exit_code == 22


def edit_tensors(change):
    def edit(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        config = folder / "adapter_config.json"
        if '"tensors"' in config.read_text():
            config.write_text(json.dumps({"kind": "delta", "tensors": sorted(tensors)}))

    return edit


def with_rules(charter, **rules):
    identity = charter.identity.model_copy(update={"adapters": AdapterRules(**rules)})
    return charter.model_copy(update={"identity": identity})


def test_good_contribution_is_admitted_by_all_checks(judge, contribute, base):
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    decision = judge(contribute())
    assert decision.state == ContributionState.ADMITTED
    assert decision.refusals == ()
    assert set(decision.checks) == ALL
    assert decision.checks[: len(MANIFEST_CHECKS)] == MANIFEST_CHECKS
    assert decision.checks[-5:] == (
        "frozen-depth",
        "near-copy",
        "other-domains",
        "own-domain-loss",
        "shared-initialisation",
    )
    assert decision.losses.specialist == pytest.approx(decision.losses.base, abs=0.05)
    assert decision.losses.specialist != decision.losses.base
    decision.check_admitted()
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("kind", ["lora", "svd", "delta"])
def test_every_kind_is_admitted(judge, contribute, write_adapter, kind):
    folder = write_adapter(kind=kind)
    assert judge(contribute(adapter=folder, kind=kind)).state == ContributionState.ADMITTED


def test_decision_survives_the_ledger(judge, contribute):
    decision = judge(contribute())
    assert AdmissionDecision.from_json(decision.to_json()) == decision
    refused = judge(contribute(base_loss=1.0))
    assert AdmissionDecision.from_json(refused.to_json()) == refused


def test_decision_says_how_many_modules_are_changed(judge, contribute, write_adapter):
    decision = judge(contribute())
    assert str(decision.effect) == "changed 8 of 8 modules"

    def zero(tensors):
        tensors[min(name for name in tensors if "lora_B" in name)].zero_()

    fewer = judge(contribute("c2", adapter=write_adapter(change=edit_tensors(zero))))
    assert str(fewer.effect) == "changed 7 of 8 modules"
    assert fewer.to_json()["effect"] == {"changed": 7, "modules": 8}
    earlier = {name: value for name, value in fewer.to_json().items() if name != "effect"}
    assert AdmissionDecision.from_json(earlier).effect is None


def test_charter_identity(judge, contribute, charter):
    contribution = contribute()
    other = charter.model_copy(
        update={"identity": charter.identity.model_copy(update={"name": "other"})}
    )
    found = f"charter {charter.identity_hash[:16]}, amendment 0"
    expect(
        judge(contribution, charter=other),
        "charter-identity", f"charter {other.identity_hash[:16]} up to amendment 0", found,
    )  # fmt: skip
    later = charter.model_copy(
        update={"amendment": charter.amendment.model_copy(update={"number": 3})}
    )
    assert judge(contribution, charter=later).state == ContributionState.ADMITTED
    expect(
        judge(contribute("later", charter=later)),
        "charter-identity", "up to amendment 0", "amendment 3",
    )  # fmt: skip


def test_base_fingerprint(judge, contribute, charter, resigned):
    identity = charter.identity.base.model_copy(update={"weights": "1" * 64, "tokenizer": "2" * 64})
    other = charter.model_copy(
        update={"identity": charter.identity.model_copy(update={"base": identity})}
    )
    contribution = contribute()
    expect(
        judge(resigned(contribution, base_weights="1" * 64, base_tokenizer="2" * 64)),
        "base-fingerprint",
        f"weights {charter.identity.base.weights[:16]}, tokenizer ",
        "weights 1111111111111111, tokenizer 2222222222222222",
    )
    refused = judge(contribution, charter=other)
    assert "base-fingerprint" in [refusal.check for refusal in refused.refusals]
    assert "Retrain on the cooperative's base" in refused.refusals[-1].fix


def test_adapter_that_says_it_was_trained_on_another_base(judge, contribute, write_adapter):
    def claim(folder):
        path = folder / "molora_adapter.json"
        text = re.sub(r'"base_weights": "[^"]*"', f'"base_weights": "{"3" * 64}"', path.read_text())
        path.write_text(text)

    decision = judge(contribute(adapter=write_adapter(change=claim)))
    expect(decision, "base-fingerprint", "adapter trained on ", "adapter trained on 3333")


def test_adapter_limits(judge, contribute, charter, write_adapter, resigned):
    contribution = contribute()
    size = contribution.manifest.adapter_files["adapter_model.safetensors"].bytes
    for rules, found in (
        ({"max_rank": 3}, "of rank 4 above the charter's 3"),
        ({"kinds": ("svd", "delta")}, "expected a kind among svd, delta, got 'lora'"),
        ({"max_bytes": size - 1}, f"expected at most {size - 1} bytes.*got {size}"),
    ):
        limited = with_rules(charter, **rules)
        signed = resigned(contribution, charter_identity=limited.identity_hash)
        # While it is read, so that nothing beyond the rules is ever in memory.
        expect(judge(signed, charter=limited), "readable-files", "can be read safely", found)
    lying = contribute("lying", adapter=write_adapter(kind="delta"))
    expect(judge(lying), "adapter-limits", "kind lora as the manifest states", "kind delta")


def test_tensor_layout(judge, contribute, write_adapter):
    def rename(tensors):
        for name in [n for n in tensors if "layers.1" in n]:
            tensors[name.replace("layers.1", "layers.9")] = tensors.pop(name)

    def extra(tensors):
        tensors["gpt_neox.embed_in.weight"] = torch.zeros(257, 32)

    def reshape(tensors):
        name = next(n for n in tensors if n.endswith("dense.weight"))
        tensors[name] = torch.zeros(32, 7)

    for number, (change, found) in enumerate(
        (
            (rename, r"layers\.9.* expected a linear layer in blocks >= 0, got none of that name"),
            (extra, "embed_in: expected a linear layer"),
            (reshape, r"expected a change of shape \(32, 32\), got \(32, 7\)"),
        )
    ):
        folder = write_adapter(f"{number}", kind="delta", change=edit_tensors(change))
        decision = judge(contribute(f"c{number}", adapter=folder, kind="delta"))
        expect(decision, "tensor-layout", "blocks >= 0", found)


def test_extra_tensor_beside_low_rank_factors(judge, contribute, write_adapter):
    def extra(tensors):
        tensors["base_model.model.gpt_neox.surprise.weight"] = torch.zeros(2, 2)

    decision = judge(contribute(adapter=write_adapter(change=edit_tensors(extra))))
    expect(decision, "readable-files", "can be read safely", "extra tensor.*surprise")


def test_frozen_depth(judge, contribute, charter, resigned):
    frozen = with_rules(charter, frozen_depth=1)
    signed = resigned(contribute("frozen"), charter_identity=frozen.identity_hash)
    expect(
        judge(signed, charter=frozen),
        "tensor-layout", "blocks >= 1", r"layers\.0.*below the frozen depth 1",
    )  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_finite_values(judge, contribute, write_adapter, value):
    def poison(tensors):
        name = next(n for n in tensors if "layers.1" in n and "lora_B" in n)
        tensors[name][3, 1] = value

    folder = write_adapter(change=edit_tensors(poison))
    decision = judge(contribute(adapter=folder))
    expect(decision, "finite-values", "finite numbers", r"NaN or infinity in .*layers\.1")


@pytest.mark.parametrize("specialist_loss", [3.0, 3.1])
def test_own_domain_loss_by_its_own_statement(judge, contribute, specialist_loss):
    decision = judge(contribute(specialist_loss=specialist_loss))
    expect(
        decision, "own-domain-loss",
        "validation loss below the base's 3.0000 nats", f"{specialist_loss:.4f} nats",
    )  # fmt: skip
    assert decision.losses is None  # Nothing was run for it.


def make_likely_blocks(base, split):
    """Blocks the base itself finds likely, so that any strong change of it is for the worse."""
    tokens = torch.arange(3)[:, None]
    while tokens.shape[1] < 16:
        tokens = torch.cat([tokens, base.model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    array = tokens.numpy().astype(np.int32)
    return Blocks("legal", split, array, array, array)


def test_own_domain_loss_on_the_admission_sample(judge, contribute, write_adapter, charter, base):
    samples = {split: make_likely_blocks(base, split) for split in Split}
    contribution = contribute(adapter=write_adapter(strength=3.0), samples=samples)
    decision = judge(contribution)
    expect(
        decision, "own-domain-loss", r"on the admission sample of 'legal'.*\+ 0\.05",
        f"{decision.losses.specialist:.4f} nats",
    )  # fmt: skip
    assert decision.losses.specialist > decision.losses.base + 0.05
    lenient = charter.model_copy(
        update={
            "amendment": Amendment(
                samples=charter.amendment.samples, admission=AdmissionRules(max_loss_rise=1e6)
            )
        }
    )
    assert judge(contribution, charter=lenient).state == ContributionState.ADMITTED


@pytest.mark.parametrize(
    ("share", "state"),
    [(0.999, ContributionState.REJECTED), (1.001, ContributionState.ADMITTED)],
)
def test_own_domain_loss_may_rise_by_the_charters_threshold(
    judge, contribute, write_adapter, charter, base, share, state
):
    samples = {split: make_likely_blocks(base, split) for split in Split}
    contribution = contribute(adapter=write_adapter(strength=3.0), samples=samples)
    losses = judge(contribution).losses
    rules = AdmissionRules(max_loss_rise=share * (losses.specialist - losses.base))
    amendment = charter.amendment.model_copy(update={"admission": rules})
    other = charter.model_copy(update={"amendment": amendment})
    assert judge(contribution, charter=other).state == state


def test_everything_wrong_is_told_at_once(judge, contribute, write_adapter, charter):
    def poison(tensors):
        tensors[next(iter(sorted(tensors)))].fill_(float("nan"))

    contribution = contribute(adapter=write_adapter(change=edit_tensors(poison)))
    other = with_rules(charter, frozen_depth=1)
    decision = judge(contribution, charter=other)
    assert [refusal.check for refusal in decision.refusals] == [
        "charter-identity", "finite-values", "tensor-layout",
    ]  # fmt: skip
    assert "own-domain-loss" not in decision.checks  # Never run on what does not fit.


@pytest.mark.parametrize("damage", ["truncated", "pickle", "empty-tensors", "config"])
def test_unreadable_adapter_is_rejected(judge, contribute, write_adapter, damage):
    def spoil(folder):
        path = folder / "adapter_model.safetensors"
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        elif damage == "pickle":
            path.write_bytes(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n.")
        elif damage == "config":
            (folder / "adapter_config.json").write_text("{")
        else:
            path.write_bytes(b"\xff" * 64)

    decision = judge(contribute(adapter=write_adapter(change=spoil)))
    expect(decision, "readable-files", "can be read safely", ".")
    assert ".." not in decision.refusals[0].message
    assert decision.checks == MANIFEST_CHECKS


def test_tokens_outside_the_vocabulary_are_rejected(judge, contribute, blocks):
    samples = {split: blocks(split, 4) for split in Split}
    bad = samples[Split.ADMISSION]
    tokens = np.array(bad.tokens)
    tokens[0, 0] = 257
    samples[Split.ADMISSION] = dataclasses.replace(bad, tokens=tokens)
    decision = judge(contribute(samples=samples))
    expect(
        decision, "readable-files", "admission blocks of 16 tokens, ids 0 to 256", "ids .* to 257"
    )


class Extra:
    """A plugin with an admission check that does what it is told."""

    def __init__(self, check):
        self.check = check

    @hookimpl
    def register_admission_checks(self, register):
        register("extra", self.check, summary="Extra", source="test")


@pytest.fixture
def judge_with(judge, charter):
    """Judge under a charter that names the check 'extra'."""
    named = charter.amendment.model_copy(update={"admission": AdmissionRules(checks=("extra",))})

    def run(check, contribution):
        return judge(
            contribution,
            plugins=load_plugins([("extra", Extra(check))]),
            charter=charter.model_copy(update={"amendment": named}),
        )

    return run


def test_check_of_a_plugin_can_quarantine(judge_with, contribute):
    def look(candidate):
        return Finding("a person's word", "nothing", "Ask the coordinator.", quarantine=True)

    decision = judge_with(look, contribute())
    assert decision.state == ContributionState.QUARANTINED
    assert set(decision.checks) >= {"extra", "tensor-layout"}
    with pytest.raises(AdmissionError, match="check 'extra': expected a person's word"):
        decision.check_admitted()


def test_refusal_outweighs_quarantine(judge_with, contribute):
    @needs(Stage.MANIFEST)
    def look(candidate):
        return Finding("a person's word", "nothing", "Ask.", quarantine=True)

    decision = judge_with(look, contribute(specialist_loss=9.0))
    assert decision.state == ContributionState.QUARANTINED  # The model stage did not run.

    def poison(candidate):
        return Finding("nothing", "something", "Stop.")

    both = judge_with(needs(Stage.ADAPTER)(poison), contribute("two", specialist_loss=9.0))
    assert both.state == ContributionState.REJECTED


class WordOptions(PluginOptions):
    word: str = "a word"


@needs(Stage.MANIFEST)
class Wants(Configurable[WordOptions]):
    def __call__(self, candidate):
        return Finding(self.options.word, "nothing", "Ask.", quarantine=True)


class WantsLater(Wants):
    @needs(Stage.ADAPTER)
    def __call__(self, candidate):
        return super().__call__(candidate)


def test_a_check_with_options_says_its_stage_and_is_known_by_its_label(judge, contribute, charter):
    plugins = load_plugins([("extra", Extra(Wants))])
    checks = [
        {"name": "extra", "options": {"word": "one"}},
        {"name": "extra", "label": "other-extra", "options": {"word": "two"}},
    ]
    named = charter.amendment.model_copy(update={"admission": AdmissionRules(checks=checks)})
    under = charter.model_copy(update={"amendment": named})
    decision = judge(contribute(), plugins=plugins, charter=under)
    assert [(one.check, one.expected) for one in decision.refusals] == [
        ("extra", "one"), ("other-extra", "two"),
    ]  # fmt: skip
    accepted = judge(contribute(), plugins=plugins, charter=under, accepted=["other-extra"])
    assert [one.check for one in accepted.refusals] == ["extra"]
    options = WordOptions()
    stages = [find_stage(check(options)) for check in (Wants, WantsLater)]
    assert stages == [Stage.MANIFEST, Stage.ADAPTER]
    assert find_stage(lambda candidate: None) == Stage.MODEL


def test_no_label_stands_in_place_of_a_check_of_the_core(judge, contribute, charter):
    plugins = load_plugins([("extra", Extra(Wants))])
    checks = [{"name": "extra", "label": "signature", "options": {"word": "one"}}]
    named = charter.amendment.model_copy(update={"admission": AdmissionRules(checks=checks)})
    under = charter.model_copy(update={"amendment": named})
    assert judge(contribute(), plugins=plugins, charter=under).state == ContributionState.ADMITTED


def test_wrong_options_of_a_check_quarantine(judge, contribute, charter):
    """As a check that fails does: nobody may be let in or refused for them."""
    plugins = load_plugins([("extra", Extra(Wants))])
    checks = [{"name": "extra", "options": {"wort": "one"}}]
    named = charter.amendment.model_copy(update={"admission": AdmissionRules(checks=checks)})
    decision = judge(
        contribute(), plugins=plugins, charter=charter.model_copy(update={"amendment": named})
    )
    assert decision.state == ContributionState.QUARANTINED
    (refusal,) = decision.refusals
    assert refusal.failed and "wort" in refusal.found


def test_an_installed_check_that_no_charter_names_does_not_run(judge, contribute):
    plugins = load_plugins([("extra", Extra(lambda candidate: 1 / 0))])
    decision = judge(contribute(), plugins=plugins)
    assert decision.state == ContributionState.ADMITTED and "extra" not in decision.checks


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "ZeroDivisionError: division by zero, at contributions/test_admission.py:"),
        ("no", "expected a Finding or None, got str"),
        (Finding("", "", ""), "expected a Finding that says what is expected"),
    ],
)
def test_faulty_check_quarantines_with_its_reason(judge_with, contribute, given, reason):
    def look(candidate):
        return given or 1 / 0

    decision = judge_with(look, contribute())
    assert decision.state == ContributionState.QUARANTINED
    (refusal,) = decision.refusals
    assert refusal.failed and refusal.check == "extra"
    assert re.search(f"Admission check 'extra' of extra.*{reason}", refusal.found)
    assert AdmissionDecision.from_json(decision.to_json()) == decision


def test_charter_may_name_its_checks(judge, contribute, charter):
    def only(*names):
        rules = Amendment(
            samples=SampleRules(calibration=4, admission=3, held_out=2),
            admission=AdmissionRules(checks=names),
        )
        return charter.model_copy(update={"amendment": rules})

    named = judge(contribute(), charter=only("charter-identity"))
    assert set(named.checks) == set(judge(contribute(), charter=only()).checks)
    assert {"adapter-limits", "finite-values", "own-domain-loss"} <= set(named.checks)
    unknown = judge(contribute(), charter=only("finite-value"))
    assert unknown.state == ContributionState.QUARANTINED
    assert "Did you mean 'finite-values'" in unknown.refusals[0].found


def test_misfit_cannot_slip_in_where_the_charter_names_another_check(
    judge, contribute, charter, write_adapter
):
    def shrink(tensors):
        for name in [n for n in tensors if "lora_A" in n]:
            tensors[name] = torch.zeros(tensors[name].shape[0], 7)

    rules = Amendment(
        samples=charter.amendment.samples, admission=AdmissionRules(checks=("own-domain-loss",))
    )
    contribution = contribute(adapter=write_adapter(change=edit_tensors(shrink)))
    decision = judge(contribution, charter=charter.model_copy(update={"amendment": rules}))
    expect(decision, "tensor-layout", ".*", ".*")
