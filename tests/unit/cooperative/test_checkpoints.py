"""Checkpoints fine-tuned elsewhere: what may differ becomes an adapter, the rest is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.files import load_adapter
from molora_fed.charter import (
    AdapterRules,
    Amendment,
    Charter,
    CorpusRules,
    Identity,
    SampleRules,
    TrainingRules,
)
from molora_fed.cooperative.checkpoints import import_checkpoint
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import AdapterError, BaseCheckpointError, IncompatibleAdapterError
from molora_fed.models.base import load_base
from molora_fed.models.frozen import fingerprint_frozen
from molora_fed.models.layout import adaptable_modules
from molora_fed.testing.models import build_tiny_model
from molora_fed.types import Split


def make_blocks(split):
    tokens = np.random.default_rng(len(split)).integers(0, 257, (6, 16), dtype=np.int32)
    documents = np.repeat(np.arange(6, dtype=np.int32)[:, None], 16, axis=1)
    return Blocks("legal", split, tokens, documents, documents)


CORPUS = SimpleNamespace(domain="legal", blocks={split: make_blocks(split) for split in Split})


@pytest.fixture
def base(tiny_checkpoint, architecture):
    return load_base(tiny_checkpoint(architecture))


def build_charter(base, depth=1, **training):
    rules = TrainingRules(**{"kind": "delta", "rank": 32, **training})
    return Charter(
        identity=Identity(
            name="tiny",
            base=base.identity(),
            adapters=AdapterRules(frozen_depth=depth),
            corpus=CorpusRules(block_size=16),
        ),
        amendment=Amendment(
            samples=SampleRules(calibration=4, admission=3, held_out=2), training=rules
        ),
    )


def fine_tune(base, folder, change=lambda model: None, *, depth=1):
    """A checkpoint with other numbers in the layers that may change, saved by transformers."""
    name = next(n for n in ("gpt_neox", "llama", "qwen3", "gemma2", "gpt2")
                if base.model.config.model_type == n)  # fmt: skip
    model = build_tiny_model(name)
    generator = torch.Generator().manual_seed(3)
    for module in adaptable_modules(model, depth).values():
        noise = torch.randn(module.weight.shape, generator=generator)
        module.weight.data += 0.05 * noise
    change(model)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["delta", "svd"])
def test_the_adapter_is_the_checkpoint(base, tmp_path, kind):
    before = fingerprint_frozen(base.model, 1)
    folder = fine_tune(base, tmp_path / "tuned")
    charter = build_charter(base, kind=kind)
    found = import_checkpoint(base, charter, CORPUS, folder, tmp_path / "out")
    specialist = found.specialist
    assert specialist.kind == kind
    # Rank 32 is that of these layers: both kinds keep the whole difference.
    assert specialist.loss == pytest.approx(found.checkpoint_loss, abs=1e-5)
    assert specialist.loss != pytest.approx(specialist.base_loss, abs=1e-3)
    assert found.start_loss is None
    adapter = load_adapter(specialist.adapter_folder, rules=charter.identity.adapters)
    assert adapter.base_weights == base.weights and adapter.hash == specialist.adapter_hash
    tokens = torch.from_numpy(CORPUS.blocks[Split.ADMISSION].tokens).long()
    tuned = load_tuned(base, folder)
    with applied(base.model, adapter) as model, torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, tuned(tokens).logits, atol=1e-4, rtol=1e-4)
    assert fingerprint_frozen(base.model, 1) == before


def load_tuned(base, folder):
    return type(base.model).from_pretrained(folder).eval()


def refuse(base, tmp_path, change, match, *, depth=1, error=IncompatibleAdapterError):
    folder = fine_tune(base, tmp_path / "tuned", change, depth=depth)
    with pytest.raises(error, match=match) as caught:
        import_checkpoint(base, build_charter(base), CORPUS, folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def norms(model):
    return [p for n, p in model.named_parameters() if "norm" in n or "ln_" in n]


@pytest.mark.parametrize("part", ["embedding", "head", "norm", "block"])
def test_one_frozen_number_off_is_refused_by_name(base, tmp_path, part):
    def change(model):
        tensors = {
            "embedding": lambda: model.get_input_embeddings().weight,
            "head": lambda: model.get_output_embeddings().weight,
            "norm": lambda: norms(model)[-1],
            "block": lambda: next(iter(adaptable_modules(model, 0).values())).weight,
        }  # fmt: skip
        flat = tensors[part]().data.view(-1)
        flat[3] = torch.nextafter(flat[3], flat[3] + 1)

    refuse(base, tmp_path, change, "first 1 blocks bit-identical to the base, got .* bytes? differ")


@pytest.mark.parametrize("architecture", ["gpt_neox"], indirect=True)
class TestRefusals:
    def test_too_shallow_a_freeze(self, base, tmp_path):
        refuse(base, tmp_path, lambda model: None, r"layers\.0\.", depth=0)

    def test_another_start(self, base, tmp_path, tiny_checkpoint):
        """The same architecture from another initialisation."""
        with pytest.raises(IncompatibleAdapterError, match="bit-identical"):
            import_checkpoint(
                base,
                build_charter(base),
                CORPUS,
                tiny_checkpoint("gpt_neox", 5),
                tmp_path / "out",
            )

    def test_another_architecture(self, base, tmp_path, tiny_checkpoint):
        with pytest.raises(IncompatibleAdapterError, match="got a LlamaForCausalLM that differs"):
            import_checkpoint(
                base, build_charter(base), CORPUS, tiny_checkpoint("llama"), tmp_path / "out"
            )

    def test_the_base_itself(self, base, tmp_path):
        with pytest.raises(AdapterError, match="got the base itself"):
            import_checkpoint(base, build_charter(base), CORPUS, base.folder, tmp_path / "out")

    def test_a_kind_that_only_training_makes(self, base, tmp_path):
        folder = fine_tune(base, tmp_path / "tuned")
        charter = build_charter(base, kind="lora")
        with pytest.raises(AdapterError, match="expected one of svd, delta, got 'lora'"):
            import_checkpoint(base, charter, CORPUS, folder, tmp_path / "out")
        found = import_checkpoint(base, charter, CORPUS, folder, tmp_path / "out", kind="delta")
        assert found.specialist.kind == "delta"

    def test_pickles_and_nothing(self, base, tmp_path):
        (tmp_path / "pickled").mkdir()
        (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        for folder in (tmp_path / "pickled", tmp_path / "none"):
            with pytest.raises(BaseCheckpointError, match="safetensors"):
                import_checkpoint(base, build_charter(base), CORPUS, folder, tmp_path / "out")

    def test_the_start_is_measured_where_it_is_given(self, base, tmp_path, tiny_checkpoint):
        folder = fine_tune(base, tmp_path / "tuned")
        losses = [
            import_checkpoint(
                base, build_charter(base), CORPUS, folder, tmp_path / "out", started_from=start
            ).start_loss
            for start in (base.folder, tiny_checkpoint("gpt_neox", 5))
        ]
        assert abs(losses[0] - losses[1]) > 0.005
        record = json.loads((tmp_path / "out" / "record.json").read_text())
        assert record["source"] == "a checkpoint fine-tuned elsewhere"

    def test_a_smaller_rank_is_measured_as_what_it_is(self, base, tmp_path):
        folder = fine_tune(base, tmp_path / "tuned")
        charter = build_charter(base, kind="svd", rank=1)
        found = import_checkpoint(base, charter, CORPUS, folder, tmp_path / "out")
        assert found.specialist.loss != pytest.approx(found.checkpoint_loss, abs=1e-5)
