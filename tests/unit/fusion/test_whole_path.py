"""The whole path on every architecture: found, train each kind, admit, bank, fuse, generate.

Both mixtures run over the same contributions; blocks below the frozen depth stay the base's.
"""

import random
from pathlib import Path

import pytest
import torch

from molora_fed.adapters.files import load_adapter
from molora_fed.charter import (
    AdapterRules,
    Amendment,
    CorpusRules,
    FusionRules,
    PrivacyRules,
    SampleRules,
    TrainingRules,
)
from molora_fed.contributions.contributed import collect_contributed
from molora_fed.contributions.states import ContributionState
from molora_fed.cooperative.contribute import make_contribution
from molora_fed.cooperative.cooperative import CharterAndBase
from molora_fed.cooperative.create import found_cooperative
from molora_fed.cooperative.fuse import fuse_contributions
from molora_fed.corpus.documents import read_documents
from molora_fed.corpus.prepare import prepare_corpus
from molora_fed.fusion.fuse import fuse
from molora_fed.inference.fused_build import build_causal_lm
from molora_fed.inference.generate import Sampling, generate
from molora_fed.models.layout import block_index, decoder_blocks
from molora_fed.routing.bundle import load_fused
from molora_fed.storage.keys import load_or_make_key
from molora_fed.testing import ARCHITECTURES

KINDS = ("lora", "svd", "delta")
FROZEN = 1


def write_texts(folder: Path, letters: str, seed: int) -> None:
    source = random.Random(seed)
    words = ["".join(source.choice(letters) for _ in range(4)) for _ in range(80)]
    folder.mkdir(parents=True)
    for index in range(120):
        text = " ".join(source.choice(words) for _ in range(40))
        (folder / f"{index:03d}.txt").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whole_path(name, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(name)
    amendment = Amendment(
        training=TrainingRules(rank=4, steps=8, batch=8, validate_every=4, learning_rate=5e-3),
        samples=SampleRules(calibration=8, admission=8, held_out=12),
        fusion=FusionRules(compare=("evidence-zero", "linear"), mixture="probability"),
    )
    cooperative, base = found_cooperative(
        tmp_path / "coop",
        "whole-path",
        source=str(source),
        adapters=AdapterRules(frozen_depth=FROZEN, max_rank=8),
        corpus=CorpusRules(block_size=32),
        amendment=amendment,
        privacy=PrivacyRules(mode="pooled"),
    )
    under = CharterAndBase(cooperative.charter, base)
    folders = []
    for number, kind in enumerate(KINDS):
        domain = f"domain-{number}"
        write_texts(tmp_path / domain, "abcdefgh"[number * 2 : number * 2 + 4], seed=number)
        corpus = prepare_corpus(
            domain,
            list(read_documents([tmp_path / domain])),
            base.tokenizer,
            rules=cooperative.charter.identity.corpus,
        )
        folder = tmp_path / f"trained-{kind}"
        key = load_or_make_key(folder / "key.pem")
        made = make_contribution(under, corpus, folder, key=key, name=f"{kind}-1", kind=kind)
        assert made.adapter.loss < made.adapter.base_loss
        adapter = load_adapter(made.adapter.folder)
        prefix, _ = decoder_blocks(base.model)
        blocks = {block_index(module, prefix) for module in adapter.updates}
        assert blocks == {FROZEN}  # of two blocks
        folders.append(folder)

    fused = fuse_contributions(cooperative, folders, out=tmp_path / "out")
    with cooperative.read_ledger() as ledger:
        assert len(ledger.contributions(ContributionState.ADMITTED)) == len(KINDS)
    assert fused.result.result["mixture"] == "probability"

    rules = amendment.fusion.model_copy(update={"mixture": "logit"})
    logit = cooperative.charter.model_copy(
        update={"amendment": amendment.model_copy(update={"fusion": rules})}
    )
    contributed = [collect_contributed(one) for one in fused.contributions]
    by_logit = fuse(base, logit, contributed, tmp_path / "logit")
    for outcome in (fused.result, by_logit):
        losses = outcome.result["losses"]
        oracle = sum(losses["domain_oracle"].values())
        assert sum(losses["token_oracle"].values()) <= oracle
        zero = sum(losses["fused"]["evidence-zero"].values())
        assert zero <= sum(losses["uniform"].values()) + 0.05
        reloaded = load_fused(outcome.fused_folder, base_folder=cooperative.base_folder)
        with torch.no_grad():
            first, again = (
                generate(build_causal_lm(model), "abcd abcd", Sampling(6, 1.0, seed=3))[0]
                for model in (outcome.fused, reloaded)
            )
        assert first.text == again.text
