import json

import pytest

from molora_fed.charter import Amendment, CorpusRules
from molora_fed.cooperative.amend import amend_by_settings, apply_settings, list_changes
from molora_fed.cooperative.cooperative import create_cooperative, open_cooperative
from molora_fed.errors import CharterError, LedgerError, UnknownNameError
from molora_fed.models.base import load_base
from molora_fed.options import name_choices


@pytest.fixture
def cooperative(tmp_path, tiny_checkpoint):
    base = load_base(tiny_checkpoint())
    return create_cooperative(tmp_path / "home", "tiny", base, corpus=CorpusRules(block_size=16))


def test_settings_reach_every_level():
    changed = apply_settings(
        Amendment(),
        [
            "domains=legal, art",
            "training.steps=600",
            "training.learning_rate=1e-3",
            'fusion.compare=["evidence-zero"]',
            "fusion.router = linear",
            "fusion.options.weight_decay=0.5",
            "fusion.base_expert=false",
            "admission.max_start_gap=0.1",
        ],
    )
    assert changed.domains == ("legal", "art")
    assert (changed.training.steps, changed.training.learning_rate) == (600, 1e-3)
    fusion = changed.fusion
    assert (fusion.router, fusion.compare) == ("linear", name_choices("evidence-zero"))
    assert (fusion.options, fusion.base_expert) == ({"weight_decay": 0.5}, False)
    assert changed.admission.max_start_gap == 0.1
    assert changed.number == 0
    again = apply_settings(changed, ["training.learning_rate=none", "domains="])
    assert again.training.learning_rate is None and again.domains == ()
    assert again.fusion == fusion


def test_changes_are_listed_by_key():
    before = Amendment()
    after = apply_settings(before, ["samples.calibration=7", "fusion.options.x=1"])
    changes = list_changes(before, after)
    assert [(c.key, c.before, c.after) for c in changes if c.after is not None] == [
        ("fusion.options.x", None, 1), ("samples.calibration", 150, 7),
    ]  # fmt: skip
    assert json.dumps([c.after for c in changes])
    assert list_changes(after, after) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("number=7", "KEY is not the number"),
        ("training.step=3", "such as training.steps"),
        ("training.steps.more=3", r"got 'training\.steps\.more'"),
        ("identity.name=x", "can never change"),
        ("training.steps=0", r"training\.steps: Input should be greater than or equal to 1"),
        ("training.steps=many", r"training\.steps: Input should be a valid integer"),
        ("training=3", "training: Input should be a valid dictionary"),
    ],
)
def test_bad_settings_are_refused_in_one_line(setting, message):
    with pytest.raises(CharterError, match=message) as caught:
        apply_settings(Amendment(), [setting])
    assert "\n" not in str(caught.value)


def test_the_next_amendment_is_signed(cooperative):
    amended, changes = amend_by_settings(cooperative, ["expected=3", "fusion.router=linear"])
    assert [change.key for change in changes] == ["expected", "fusion.router"]
    assert open_cooperative(cooperative.folder) == amended
    assert amended.charter.amendment.number == 1
    again, changes = amend_by_settings(amended, ["expected=3"])
    assert (again, changes) == (amended, [])
    later, _ = amend_by_settings(amended, ["expected=4"])
    assert later.charter.amendment.number == 2
    assert later.charter.amendment.fusion.router == "linear"
    assert later.charter.identity_hash == cooperative.charter.identity_hash


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ("fusion.router=linea", UnknownNameError, "Did you mean 'linear'"),
        (
            "fusion.options.decoy=1",
            CharterError,
            "router 'evidence-mixed': expected valid values.*decoy",
        ),
        ("training.kind=pikle", CharterError, "a training kind among"),
        ("training.rank=65", CharterError, "a training rank of at most 64"),
        ("admission.checks=finite", UnknownNameError, "Unknown admission check"),
    ],
)
def test_what_cannot_be_fused_is_not_signed(cooperative, setting, error, message):
    with pytest.raises(error, match=message):
        amend_by_settings(cooperative, [setting])
    assert open_cooperative(cooperative.folder) == cooperative


def test_a_cooperative_that_is_served_is_not_amended(cooperative):
    with cooperative.open_ledger(), pytest.raises(LedgerError, match="only writer"):
        amend_by_settings(cooperative, ["expected=3"])
