"""A tiny charter, and contributions to it that are good unless a test says otherwise."""

import copy

import numpy as np
import pytest

from molora_fed.adapters.save import save_adapter
from molora_fed.charter import Amendment, Charter, CorpusRules, Identity, SampleRules
from molora_fed.contributions.build import build_contribution
from molora_fed.contributions.ledger import Ledger, create_ledger
from molora_fed.contributions.reading import sign_amendment
from molora_fed.contributions.store import BlobStore
from molora_fed.corpus.blocks import Blocks
from molora_fed.models.base import load_base
from molora_fed.plugins import load_plugins
from molora_fed.storage.keys import build_public_pem
from molora_fed.testing import build_random_adapter
from molora_fed.types import Split

BLOCK_SIZE = 16


@pytest.fixture(scope="session")
def plugins():
    return load_plugins()


@pytest.fixture(scope="session")
def base(tiny_checkpoint):
    return load_base(tiny_checkpoint())


@pytest.fixture(scope="session")
def charter(base) -> Charter:
    return Charter(
        identity=Identity(
            name="tiny", base=base.identity(), corpus=CorpusRules(block_size=BLOCK_SIZE)
        ),
        amendment=Amendment(samples=SampleRules(calibration=4, admission=3, held_out=2)),
    )


@pytest.fixture(scope="session")
def adapter_folder(base, tmp_path_factory):
    """An adapter that changes next to nothing, so that it is no worse than the base."""
    folder = tmp_path_factory.mktemp("adapters") / "good"
    save_adapter(build_random_adapter(base.model, strength=1e-3), base.model, folder)
    return folder


@pytest.fixture
def write_adapter(base, tmp_path):
    """`write_adapter(change)`: the folder of an adapter whose tensors `change` has changed."""

    def write(name="changed", change=None, **settings):
        adapter = build_random_adapter(base.model, **{"strength": 1e-3, **settings})
        adapter = copy.deepcopy(adapter)
        folder = tmp_path / "adapters" / name
        save_adapter(adapter, base.model, folder)
        if change is not None:
            change(folder)
        return folder

    return write


def make_blocks(split, count, *, domain="legal", size=BLOCK_SIZE, seed=0, vocabulary=257) -> Blocks:
    generator = np.random.default_rng([seed, count])
    tokens = generator.integers(0, vocabulary, (count, size), dtype=np.int32)
    documents = np.repeat(np.arange(count, dtype=np.int32)[:, None], size, axis=1)
    return Blocks(domain, split, tokens, documents, documents)


@pytest.fixture(scope="session")
def blocks():
    """`blocks(split, count, ...)`: random blocks."""
    return make_blocks


@pytest.fixture
def contribute(tmp_path, charter, adapter_folder, contributor_key):
    """`contribute(**changes)`: the folder of a contribution."""

    def build(folder="contribution", **changes):
        domain = changes.get("domain", "legal")
        arguments = {
            "adapter": adapter_folder,
            "kind": "lora",
            "samples": {split: make_blocks(split, 10, domain=domain) for split in Split},
            "key": contributor_key,
            "charter": charter,
            "contributor": "legal-07",
            "domain": domain,
            "training": {"threads": 1, "dtype": "float32", "versions": {"torch": "2"}},
            "base_loss": 3.0,
            "specialist_loss": 2.5,
            "contamination": 0.01,
        }
        return build_contribution(tmp_path / folder, **{**arguments, **changes})

    return build


@pytest.fixture
def ledger_path(tmp_path, charter, coordinator_key):
    path = tmp_path / "home" / "ledger.db"
    create_ledger(
        path,
        coordinator_key=build_public_pem(coordinator_key),
        first=sign_amendment(coordinator_key, charter.identity_hash, charter.amendment),
    )
    return path


@pytest.fixture
def ledger(ledger_path):
    with Ledger(ledger_path) as opened:
        yield opened


@pytest.fixture
def store(tmp_path) -> BlobStore:
    return BlobStore(tmp_path / "home" / "blobs")
