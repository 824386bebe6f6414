"""Statistics of hidden states at the door: who must have them, who must not, and which are good."""

import shutil
from dataclasses import replace

import pytest
import torch

from molora_fed.charter import CorpusRules, Identity
from molora_fed.contributions.build import describe_contribution
from molora_fed.contributions.ledger import Ledger, create_ledger
from molora_fed.contributions.reading import sign_amendment
from molora_fed.contributions.receive import receive_contribution
from molora_fed.contributions.states import ContributionState
from molora_fed.errors import AdapterError, AdmissionError
from molora_fed.models.hidden_statistics import (
    HiddenStatistics,
    collect_statistics,
    compute_statistics_bytes,
)
from molora_fed.storage.keys import build_public_pem


@pytest.fixture
def publishing(base, charter):
    """The same charter with published statistics, of 4 to 40 blocks of 16 tokens."""
    identity = Identity(
        version=2, name="tiny", base=base.whole_identity(), corpus=CorpusRules(block_size=16),
        privacy_mode="statistics",
    )  # fmt: skip
    samples = charter.amendment.samples.model_copy(update={"calibration": 60})
    amendment = charter.amendment.model_copy(update={"samples": samples})
    return charter.model_copy(update={"identity": identity, "amendment": amendment})


@pytest.fixture
def receive(tmp_path, store, base, plugins, coordinator_key):
    """`receive(contribution, charter)`: the receipt, from a ledger of that charter."""
    opened = []

    def run(contribution, charter):
        path = tmp_path / "own" / f"{len(opened)}.db"
        create_ledger(
            path, coordinator_key=build_public_pem(coordinator_key),
            first=sign_amendment(coordinator_key, charter.identity_hash, charter.amendment),
        )  # fmt: skip
        opened.append(Ledger(path))
        return receive_contribution(
            opened[-1], store, contribution.folder, charter=charter, base=base, plugins=plugins
        )

    yield run
    for ledger in opened:
        ledger.close()


def build_statistics(base, tokens=960, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return collect_statistics(
        "legal", [torch.randn(1, tokens, base.hidden_size, generator=generator)]
    )


def test_they_are_signed_stored_and_admitted(base, contribute, publishing, receive, store):
    found = build_statistics(base)
    made = contribute(charter=publishing, statistics=found)
    entry = made.manifest.files["statistics.safetensors"]
    assert made.manifest.statistics_file == entry
    assert entry.bytes <= compute_statistics_bytes(base.hidden_size)
    assert receive(made, publishing).state == ContributionState.ADMITTED
    assert store.has(entry.sha256)
    plain = contribute("plain")
    assert b"statistics" not in plain.manifest.canonical and plain.statistics_path is None
    assert [r.what for r in describe_contribution(plain.manifest)][-1] == "manifest"


def test_without_them_and_with_them_elsewhere_a_contribution_is_refused_in_one_line(
    base, contribute, charter, publishing, receive
):
    with pytest.raises(AdmissionError, match=r"statistics.safetensors of hidden states, got none"):
        receive(contribute(charter=publishing), publishing)
    made = contribute("other", charter=charter, statistics=build_statistics(base))
    with pytest.raises(AdmissionError, match=r"expected no statistics\.safetensors.*got one\. "):
        receive(made, charter)


def test_a_file_that_is_not_signed_or_another_one_is_refused(base, contribute, publishing, receive):
    made = contribute(charter=publishing, statistics=build_statistics(base))
    build_statistics(base, seed=1).save(made.folder / "statistics.safetensors")
    with pytest.raises(AdapterError, match=r"'statistics\.safetensors' of 'legal-07'"):
        receive(made, publishing)
    plain = contribute("plain", charter=publishing, statistics=build_statistics(base))
    (plain.folder / "statistics.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"statistics\.safetensors: missing"):
        receive(plain, publishing)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda one: replace(one, mean=one.mean * float("nan")), "finite numbers in 'mean'"),
        (lambda one: replace(one, covariance=-one.covariance), "variances of"),
        (lambda one: replace(one, tokens=10**9), "to 960 tokens"),
        (lambda one: replace(one, tokens=8), "to 960 tokens"),
        (
            lambda one: HiddenStatistics("legal", 960, torch.zeros(2), torch.eye(2)),
            "the base's",
        ),
    ],
)
def test_what_no_text_asked_for_could_have_is_rejected_at_the_door(
    base, contribute, publishing, receive, edit, words
):
    made = contribute(charter=publishing, statistics=edit(build_statistics(base)))
    receipt = receive(made, publishing)
    assert receipt.state == ContributionState.REJECTED
    (refusal,) = receipt.decision.refusals
    assert words in refusal.message and "\n" not in refusal.message
    assert refusal.check == "readable-files"


def test_an_oversize_file_is_refused_before_it_is_read(base, contribute, publishing, receive):
    wide = HiddenStatistics("legal", 960, torch.zeros(900), torch.eye(900))
    made = contribute(charter=publishing, statistics=wide)
    most = compute_statistics_bytes(base.hidden_size)
    with pytest.raises(AdmissionError, match=f"statistics.safetensors of at most {most} bytes"):
        receive(made, publishing)
    shutil.rmtree(made.folder)
