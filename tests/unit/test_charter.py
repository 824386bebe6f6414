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
    read_amendment,
    write_charter,
)
from molora_fed.errors import CharterError
from molora_fed.options import name_choices

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


def test_a_router_that_nobody_named_stays_the_one_it_was():
    head = f'[identity]\nname = "coop"\n[identity.base]\nid = "tiny"\nweights = "{"a" * 64}"\n'
    head += f'tokenizer = "{"b" * 64}"\n'
    for text in (head, head + "[amendment]\nseed = 7\n[amendment.fusion]\nrestarts = 1\n"):
        fusion = parse_charter(text).amendment.fusion
        assert (fusion.router, fusion.compare) == (
            "evidence",
            name_choices("evidence-zero", "linear"),
        )
    assert read_amendment({"number": 2}).fusion.router == "evidence"
    named = {"fusion": {"router": "linear", "compare": []}}
    assert read_amendment(named).fusion.router == "linear"
    assert read_amendment(named).fusion.compare == ()


def test_a_new_cooperative_writes_its_router_down(tmp_path):
    write_charter(CHARTER, tmp_path / "cooperative.toml")
    text = (tmp_path / "cooperative.toml").read_text()
    assert f'router = "{Amendment().fusion.router}"' in text
    assert Amendment().fusion.router != "evidence"
    assert load_charter(tmp_path) == CHARTER


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
