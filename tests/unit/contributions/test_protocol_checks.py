"""The protocol's rules at admission: frozen tensors bit-identical, one shared start."""

import dataclasses
import json

import pytest
import torch

from molora_fed.charter import AdapterRules, AdmissionRules
from molora_fed.contributions.admission import AdmissionCandidate, admit
from molora_fed.contributions.build import measure_start_loss
from molora_fed.contributions.checks import DTYPE_ALLOWANCE
from molora_fed.contributions.manifest import load_contribution, parse_manifest
from molora_fed.contributions.states import ContributionState
from molora_fed.errors import CorpusError
from molora_fed.models.base import load_base
from molora_fed.models.frozen import find_changed_frozen, fingerprint_frozen, list_frozen
from molora_fed.models.layout import adaptable_modules
from molora_fed.models.runtime import Placement
from molora_fed.storage.files import canonical_json
from molora_fed.types import Split


@pytest.fixture
def judge(base, plugins):
    def run(contribution, charter, own=base):
        return admit(AdmissionCandidate(contribution, charter, own, plugins))

    return run


@pytest.fixture
def samples(blocks):
    return {split: blocks(split, 10) for split in Split}


def amend(charter, **rules):
    admission = AdmissionRules(**rules)
    return charter.model_copy(
        update={"amendment": charter.amendment.model_copy(update={"admission": admission})}
    )


def freeze(charter, depth):
    identity = charter.identity.model_copy(update={"adapters": AdapterRules(frozen_depth=depth)})
    return charter.model_copy(update={"identity": identity})


def test_frozen_tensors_are_all_but_the_linear_layers_that_may_change(model):
    for depth in (0, 1):
        frozen = list_frozen(model, depth)
        free = {
            f"{name}.{part}"
            for name, module in adaptable_modules(model, depth).items()
            for part, _ in module.named_parameters()
        }
        everything = {n for n, _ in model.named_parameters(remove_duplicate=False)}
        assert everything - frozen.keys() == free
        assert everything - free <= frozen.keys()


def test_a_single_bit_of_any_frozen_tensor_is_found(tiny_model, architecture):
    base, other = tiny_model(architecture), tiny_model(architecture)
    assert find_changed_frozen(base, other, 1) == []
    for name, tensor in list_frozen(other, 1).items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        flat = tensor.data.view(-1)
        before = flat[-1].clone()
        flat[-1] = torch.nextafter(before, before + 1)
        changed = find_changed_frozen(base, other, 1)
        assert f"{name}: " in "; ".join(changed)
        expected = {entry.partition(":")[0] for entry in changed}
        one, two = fingerprint_frozen(base, 1), fingerprint_frozen(other, 1)
        assert {n for n in one if one[n] != two[n]} == expected
        flat[-1] = before
    assert find_changed_frozen(base, other, 1) == []


def test_a_change_of_free_layers_is_none_of_frozen_tensors(tiny_model):
    base, other = tiny_model(), tiny_model()
    for module in adaptable_modules(other, 1).values():
        module.weight.data += 1
    assert find_changed_frozen(base, other, 1) == []
    found = find_changed_frozen(base, other, 0)
    assert found == []
    for module in adaptable_modules(other, 0).values():
        module.weight.data += 1
    assert all("layers.0." in entry for entry in find_changed_frozen(base, other, 1))


def test_minus_zero_and_other_sizes_are_differences(tiny_model):
    base, other = tiny_model(), tiny_model()
    name, tensor = next(iter(list_frozen(base, 0).items()))
    for model, value in ((base, 0.0), (other, -0.0)):
        dict(model.named_parameters())[name].data.view(-1)[0] = value
    assert torch.equal(tensor, dict(other.named_parameters())[name])
    assert find_changed_frozen(base, other, 0) == [f"{name}: 1 bytes differ"]
    half = tiny_model().bfloat16()
    assert all("bfloat16" in entry for entry in find_changed_frozen(base, half, 0))
    assert len(find_changed_frozen(base, tiny_model("llama"), 0)) > 2


def test_an_adapter_below_the_frozen_depth_is_rejected_by_what_it_does(judge, contribute, charter):
    """Whatever other check the charter names."""
    strict = amend(freeze(charter, 1), checks=("frozen-depth",))
    decision = judge(contribute(charter=strict), strict)
    assert decision.state == ContributionState.REJECTED
    (refusal,) = decision.refusals
    assert "blocks >= 1" in refusal.expected
    assert "layers.0." in refusal.found and "layers.1." not in refusal.found
    assert "\n" not in refusal.message


@pytest.mark.parametrize("kind", ["lora", "svd", "delta"])
def test_a_frozen_adapter_is_admitted_and_leaves_the_base_alone(
    judge, contribute, charter, write_adapter, base, kind
):
    frozen = freeze(charter, 1)
    before = fingerprint_frozen(base.model, 1)
    folder = write_adapter(kind=kind, frozen_depth=1)
    decision = judge(contribute(adapter=folder, kind=kind, charter=frozen), frozen)
    assert decision.state == ContributionState.ADMITTED
    assert fingerprint_frozen(base.model, 1) == before


def test_a_start_from_the_base_is_admitted(judge, contribute, charter, base, samples):
    start = measure_start_loss(base.model, samples, charter, domain="legal")
    decision = judge(contribute(samples=samples, start_loss=start), charter)
    assert decision.state == ContributionState.ADMITTED
    assert start == decision.losses.base


def test_a_start_from_another_checkpoint_is_quarantined(
    judge, contribute, charter, tiny_checkpoint, samples
):
    other = load_base(tiny_checkpoint("gpt_neox", 5))
    start = measure_start_loss(other.model, samples, charter, domain="legal")
    contribution = contribute(samples=samples, start_loss=start)
    decision = judge(contribution, charter)
    assert decision.state == ContributionState.QUARANTINED
    (refusal,) = decision.refusals
    assert refusal.check == "shared-initialisation" and refusal.quarantine
    assert f"{start:.4f} nats" in refusal.found
    assert f"{decision.losses.base:.4f} nats (within 0.005)" in refusal.expected
    # A wider tolerance is an amendment; the same start is then no obstacle.
    gap = abs(start - decision.losses.base)
    lenient = amend(charter, max_start_gap=gap * 1.01)
    assert judge(contribution, lenient).state == ContributionState.ADMITTED


def test_a_start_in_another_dtype_may_be_a_little_further_off(
    judge, contribute, charter, base, samples
):
    start = measure_start_loss(base.model, samples, charter, domain="legal")

    def decide(off, **training):
        contribution = contribute(
            f"c{off}-{len(training)}", samples=samples, start_loss=start + off, training=training
        )
        return judge(contribution, charter)

    assert decide(0.0049, dtype="float32").state == ContributionState.ADMITTED
    assert decide(0.0079, dtype="bfloat16").state == ContributionState.ADMITTED
    for given in (
        {"dtype": "float32"},
        {"dtype": "bfloat16", "losses_in": "float32"},
        {"dtype": 3},
    ):
        assert decide(0.0078, **given).state == ContributionState.QUARANTINED
    (refusal,) = decide(0.0081, dtype="bfloat16").refusals
    assert "(within 0.008) on the admission sample in float32" in refusal.expected
    assert refusal.found.endswith("nats in bfloat16")


@pytest.mark.parametrize("strength", [0.001, 0.03, 0.1, 0.3])
def test_a_verdict_is_the_same_in_both_dtypes_unless_it_is_close(
    judge, contribute, charter, base, write_adapter, tiny_checkpoint, strength
):
    """Thresholds count in whichever dtype the coordinator measures."""
    contribution = contribute(adapter=write_adapter(strength=strength))
    half = load_base(tiny_checkpoint(), Placement(dtype=torch.bfloat16))
    decisions = [judge(contribution, charter, one) for one in (base, half)]
    rises = [one.losses.specialist - one.losses.base for one in decisions]
    assert abs(rises[0] - rises[1]) <= DTYPE_ALLOWANCE
    threshold = charter.amendment.admission.max_loss_rise
    if abs(rises[0] - threshold) > DTYPE_ALLOWANCE:
        assert decisions[0].state == decisions[1].state
        assert (decisions[0].state == ContributionState.ADMITTED) == (rises[0] <= threshold)


def test_an_earlier_manifest_states_no_start_and_passes(judge, contribute, charter):
    contribution = contribute()
    assert contribution.manifest.start_loss is None
    assert judge(contribution, charter).state == ContributionState.ADMITTED


def test_a_manifest_of_an_earlier_version_keeps_its_id(contribute):
    """The key that it does not have is not part of what was signed."""
    contribution = contribute()
    value = json.loads(contribution.manifest.canonical)
    assert "start_loss" not in value
    assert parse_manifest(canonical_json(value)).contribution_id == contribution.id
    with_null = parse_manifest(canonical_json({**value, "start_loss": None}))
    assert with_null.contribution_id == contribution.id


def test_the_statement_is_signed(contribute):
    contribution = contribute(start_loss=2.75)
    assert load_contribution(contribution.folder).manifest.start_loss == 2.75
    assert json.loads(contribution.manifest.canonical)["start_loss"] == 2.75
    changed = dataclasses.replace(
        contribution, manifest=contribution.manifest.model_copy(update={"start_loss": 2.5})
    )
    assert changed.id != contribution.id


def test_a_start_is_measured_on_the_blocks_that_are_sent(charter, base, samples):
    """The charter asks for three of ten."""
    first = measure_start_loss(base.model, samples, charter, domain="legal")
    samples[Split.ADMISSION] = samples[Split.ADMISSION].take(3)
    assert measure_start_loss(base.model, samples, charter, domain="legal") == first
    del samples[Split.ADMISSION]
    with pytest.raises(CorpusError, match="no admission block"):
        measure_start_loss(base.model, samples, charter, domain="legal")


def test_checks_are_registered_with_their_source(plugins):
    for name in ("frozen-depth", "shared-initialisation"):
        assert "2603.22755" in plugins.admission_checks.entry(name).source
