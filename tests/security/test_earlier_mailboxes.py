"""Mailboxes that the version before typed letters left: the server and contributors go on."""

import json

import pytest
from hostile import HASH, make_key

from molora_fed.federation.client_dialogue import answer
from molora_fed.federation.envelopes import Envelope, open_letter, read_letter
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.kept import HelloRecord, Offer
from molora_fed.federation.letters import (
    Acknowledgement,
    AnswerLetter,
    CharterLetter,
    QuestionLetter,
    Refusal,
    ResultLetter,
    ShownState,
    State,
    Task,
)
from molora_fed.storage.files import write_json
from molora_fed.storage.keys import build_public_pem

FILES = [{"name": "adapter/a.bin", "sha256": HASH, "num_bytes": 3}]
SAME = {
    HelloRecord: {"public_key": build_public_pem(make_key(1)), "name": "a-1", "domain": "python"},
    ShownState: {"phase": "TRAINING", "message": "", "step": 1, "total": 2, "loss": 2},
    Offer: {"id": HASH, "files": FILES, "recipe": HASH},
    Refusal: {"reason": "no"},
    AnswerLetter: {"question": HASH, "files": FILES, "signature": "ab"},
    Acknowledgement: {
        "shipment": HASH, "contribution_id": HASH, "state": "ADMITTED", "findings": ["One.  Two."],
        "signature": "ab",
    },
    QuestionLetter: {
        "id": HASH, "files": FILES, "part_bytes": 10, "answer_bytes": 10, "amendment": 0,
        "signature": "ab",
    },
    Task: {"id": "train-0", "kind": "train"},
}  # fmt: skip
ASKED_AGAIN = {
    CharterLetter: {
        "id": HASH, "text": "", "base": FILES, "tasks": [SAME[Task]], "part_bytes": 10,
        "public_key": "", "signature": "ab",
    },
    ResultLetter: {"id": HASH, "files": FILES, "summary": {"contributions": []}, "part_bytes": 10},
}  # fmt: skip


@pytest.mark.parametrize("model", SAME, ids=lambda model: model.__name__)
def test_what_did_not_change_is_read(tmp_path, model):
    write_json(tmp_path / "letter.json", SAME[model])
    letter = read_letter(tmp_path / "letter.json", model)
    if model is Acknowledgement:  # signed: not a character may change
        assert letter.to_json() == SAME[model]


@pytest.mark.parametrize("model", ASKED_AGAIN, ids=lambda model: model.__name__)
def test_what_was_not_signed_is_asked_for_again(tmp_path, model):
    path = tmp_path / "letter.json"
    write_json(path, ASKED_AGAIN[model])
    assert open_letter(path, model) is None
    assert json.loads((tmp_path / "letter.json.malformed").read_bytes()) == ASKED_AGAIN[model]


def test_a_contributors_inbox_of_then_is_taken_up(tmp_path):
    home = ContributorHome(tmp_path)
    write_json(home.charter_letter, ASKED_AGAIN[CharterLetter])
    write_json(home.result_letter, ASKED_AGAIN[ResultLetter])
    write_json(home.acknowledgement_letter, SAME[Acknowledgement])
    write_json(home.offer_file, SAME[Offer])
    write_json(home.tasks / "train-0.json", SAME[Task])
    said = answer(home, Envelope()).find(State)
    assert (said.charter, said.result, said.acknowledged) == ("", "", HASH)
    assert said.tasks == ["train-0"]
