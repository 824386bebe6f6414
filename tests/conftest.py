"""Fixtures every room shares, beside those that come with molora-fed itself."""

import os
from pathlib import Path
from typing import Any

# Before torch is loaded, here and in the processes that tests start: models this small run fastest
# on one thread, and many threads on few cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What the user of this machine disabled is no business of the tests.
os.environ["MOLORA_CONFIG"] = str(Path(__file__).parent / "no-settings")
os.environ.pop("MOLORA_PLUGINS", None)

import pytest
import torch
from hypothesis import settings
from plugin_packages import Packages
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from molora_fed.storage.keys import load_or_make_key
from molora_fed.testing import pytest_plugin
from molora_fed.testing.models import ARCHITECTURES

# By name, so that they are there however molora-fed was installed.
_kept_cooperative = pytest_plugin._kept_cooperative
tiny_bank, tiny_base = pytest_plugin.tiny_bank, pytest_plugin.tiny_base
tiny_candidate, tiny_cooperative = pytest_plugin.tiny_candidate, pytest_plugin.tiny_cooperative
tiny_checkpoint, tiny_model = pytest_plugin.tiny_checkpoint, pytest_plugin.tiny_model

# Times are no property of what is tested: machines are busy.
settings.register_profile("molora", deadline=None)
settings.load_profile("molora")


@pytest.fixture(autouse=True)
def _umask():
    """Some commands close their process's files to others; a test's are as they usually are."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Third-party distributions that a test installs, see `Packages`."""
    made = Packages(tmp_path / "site", monkeypatch)
    yield made
    made.close()


@pytest.fixture(params=ARCHITECTURES)
def architecture(request) -> str:
    """Runs the test once for each tiny architecture."""
    return request.param


@pytest.fixture
def model(tiny_model, architecture) -> Any:
    """A tiny model of every architecture in turn."""
    return tiny_model(architecture)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer without merges, 257 ids, end-of-text id 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)} | {"<|end|>": 256}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@pytest.fixture
def tokens() -> torch.Tensor:
    """Random token ids of the tiny vocabulary, (2, 24)."""
    return torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def contributor_key(tmp_path_factory):
    return load_or_make_key(tmp_path_factory.mktemp("keys") / "key.pem")


@pytest.fixture(scope="session")
def coordinator_key(tmp_path_factory):
    return load_or_make_key(tmp_path_factory.mktemp("keys") / "coordinator.pem")
