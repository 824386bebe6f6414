"""A contributor's own copy of the base: nothing of it is sent, and a wrong one is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from molora_fed.charter import Amendment, Charter, Identity, write_charter
from molora_fed.errors import BaseCheckpointError
from molora_fed.federation.client_dialogue import answer
from molora_fed.federation.coordinator_mail import publish_charter
from molora_fed.federation.homes import ContributorHome, CoordinatorHome
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.messages import list_describing, plan_parts
from molora_fed.federation.server_dialogue import RemoteContributor, ServerDialogue
from molora_fed.federation.worker_mail import (
    receive_base,
    receive_charter,
)
from molora_fed.models.base import CARD_FILE, fetch_base, load_base
from molora_fed.storage.keys import load_or_make_key
from molora_fed.types import CONFIG_FILES, TOKENIZER_FILES

PART = 20_000


class Pair:
    """A server with a tiny base, and a contributor who has a copy of its own."""

    def __init__(self, root, checkpoint, *, base):
        self.server, self.client = (
            CoordinatorHome(root / "server"),
            ContributorHome(root / "client"),
        )
        self.base = fetch_base(str(checkpoint), self.server.base)
        (self.server.base / "metrics.jsonl").write_text("{}\n")  # no part of the checkpoint
        identity = Identity(name="test", base=self.base.whole_identity(), version=2)
        write_charter(
            Charter(identity=identity, amendment=Amendment(expected=1)), self.server.charter
        )
        for home in (self.server, self.client):
            home.key.parent.mkdir(parents=True, exist_ok=True)
            load_or_make_key(home.key)
        charter = Charter(identity=identity, amendment=Amendment(expected=1))
        publish_charter(self.server, charter, load_or_make_key(self.server.key), part_bytes=PART)
        JoinSettings("alpha", "python", base=base).save(self.client.settings_file)
        self.dialogue = ServerDialogue(self.server, message_bytes=PART, wait_seconds=0)
        self.remote = RemoteContributor()
        self.sent = []

    def talk(self, times=30):
        """Exchange until nothing is said any more, or the base is there; whether it is."""
        for _ in range(times):
            envelope = self.dialogue.next_envelope(self.remote)
            if envelope is not None:
                self.sent += [part.name for part in envelope.parts]
                self.dialogue.accept(self.remote, answer(self.client, envelope))
            if receive_charter(self.client) is not None and receive_base(self.client):
                return True
        return False

    @property
    def checkpoint_hashes(self):
        """SHA-256 of all files of the checkpoint."""
        return set(self.base.files.values())


def test_of_an_own_base_no_byte_is_sent_and_it_is_the_servers(tiny_checkpoint, tmp_path):
    pair = Pair(tmp_path, tiny_checkpoint("llama"), base=str(tiny_checkpoint("llama")))
    assert pair.talk()
    assert {name.sha256 for name in pair.sent}.isdisjoint(pair.checkpoint_hashes)
    own = load_base(pair.client.base)
    assert own.whole_identity() == pair.base.whole_identity()
    assert (pair.client.base / "metrics.jsonl").is_file()
    before = len(pair.sent)
    assert pair.talk(5) and len(pair.sent) == before


def test_without_one_the_whole_base_is_sent(tiny_checkpoint, tmp_path):
    pair = Pair(tmp_path, tiny_checkpoint("llama"), base="")
    assert pair.talk(200)
    assert pair.checkpoint_hashes <= {name.sha256 for name in pair.sent}


def test_whoever_lost_the_own_copy_is_sent_the_servers(tiny_checkpoint, tmp_path):
    pair = Pair(tmp_path, tiny_checkpoint("llama"), base=str(tiny_checkpoint("llama")))
    assert pair.talk()
    shutil.rmtree(pair.client.base)
    JoinSettings("alpha", "python").save(pair.client.settings_file)
    assert pair.talk(200) and load_base(pair.client.base).weights == pair.base.weights


def change_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name] + torch.eye(*weights[name].shape)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def drop_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_tensor, "first other in tensor 'model.layers.1.mlp.up_proj.weight'"),
        (drop_tensor, "first other in tensor 'model.layers.0.self_attn.k_proj.weight'"),
        (change_config, "the same weights, but another config.json"),
        (lambda folder: shutil.rmtree(folder), "expected a folder, a GGUF file, or ID@REVISION"),
    ],
)
def test_another_base_is_refused_by_what_differs(tiny_checkpoint, tmp_path, change, named):
    own = tmp_path / "own"
    shutil.copytree(tiny_checkpoint("llama"), own)
    change(own)
    pair = Pair(tmp_path, tiny_checkpoint("llama"), base=str(own))
    with pytest.raises(BaseCheckpointError, match=named) as found:
        pair.talk()
    assert "\n" not in str(found.value) and not pair.client.base.exists()
    assert {name.sha256 for name in pair.sent}.isdisjoint(pair.checkpoint_hashes)


def test_what_describes_a_base_is_no_file_of_it(tiny_checkpoint, tmp_path):
    pair = Pair(tmp_path, tiny_checkpoint("gpt_neox"), base="")
    letter = pair.dialogue.next_envelope(pair.remote)
    assert letter is not None
    names = {*CONFIG_FILES, *TOKENIZER_FILES}
    from molora_fed.federation.messages import describe_folder

    base = describe_folder(pair.server.base)
    described = {entry.name for entry in list_describing(base).files}
    assert described == {CARD_FILE, "metrics.jsonl"} and described.isdisjoint(names)
    assert plan_parts(list_describing(base), part_bytes=PART)
