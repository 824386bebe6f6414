"""The charter's identity is fixed by its content, and bad charters are refused in one line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora_fed.charter import (
    Amendment,
    BaseIdentity,
    Charter,
    FusionRules,
    Identity,
    TrainingRules,
    load_charter,
    parse_charter,
    write_charter,
)
from molora_fed.errors import CharterError

BASE = BaseIdentity(id="tiny", weights="a" * 64, tokenizer="b" * 64)
CHARTER = Charter(identity=Identity(name="coop", base=BASE))


def test_round_trip_keeps_everything(tmp_path):
    charter = CHARTER.model_copy(
        update={"amendment": Amendment(domains=("python", "cpp"), expected=2)}
    )
    write_charter(charter, tmp_path / "cooperative.toml")
    assert load_charter(tmp_path) == charter
    assert load_charter(tmp_path / "cooperative.toml").identity_hash == charter.identity_hash


@given(st.integers(1, 10_000), st.integers(1, 50))
def test_amendments_never_change_the_identity(steps, number):
    amendment = Amendment(number=number, training=TrainingRules(steps=steps))
    assert (
        CHARTER.model_copy(update={"amendment": amendment}).identity_hash == CHARTER.identity_hash
    )


def test_options_of_the_kind_are_kept_and_an_amendment_without_any_reads_as_before(tmp_path):
    assert "options" not in TrainingRules().model_dump(mode="json")
    training = TrainingRules(options={"precision": "int4", "targets": ["q_proj"]})
    charter = CHARTER.model_copy(update={"amendment": Amendment(training=training)})
    write_charter(charter, tmp_path / "cooperative.toml")
    assert load_charter(tmp_path) == charter


def test_the_headlines_predictors_are_left_out_where_usual(tmp_path):
    assert "headline" not in FusionRules().model_dump(mode="json")
    assert FusionRules().headline == ("measured-alone", "measured-specialist")
    fusion = FusionRules(headline=("mine",))
    charter = CHARTER.model_copy(update={"amendment": Amendment(fusion=fusion)})
    write_charter(charter, tmp_path / "cooperative.toml")
    assert load_charter(tmp_path) == charter


def test_any_change_of_the_identity_changes_its_hash():
    other = Identity(name="coop", base=BASE.model_copy(update={"weights": "c" * 64}))
    assert Charter(identity=other).identity_hash != CHARTER.identity_hash


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ('[identity]\nname = "coop"\nsurprise = 1\n', "identity.surprise"),
        ("[identity]\n", "identity.name"),
        ("not toml", "TOML"),
        ("[amendment.fusion]\nroutr = 'evidence'\n", "amendment.fusion.routr"),
        ("[amendment.training]\nsteps = 0\n", "amendment.training.steps"),
    ],
)
def test_bad_charters_name_the_offender_in_one_line(change, named):
    with pytest.raises(CharterError) as caught:
        parse_charter(change)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_charter_says_how_to_make_one(tmp_path):
    with pytest.raises(CharterError, match="molora coop create"):
        load_charter(tmp_path)
