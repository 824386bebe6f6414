"""The coordinator's door with a tiny cooperative behind it, for uploads that are not honest."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from molora_fed.adapters.save import save_adapter
from molora_fed.charter import AdapterRules, Amendment, Charter, CorpusRules, Identity, SampleRules
from molora_fed.contributions.build import build_contribution
from molora_fed.contributions.ledger import Ledger, create_ledger
from molora_fed.contributions.manifest import parse_manifest
from molora_fed.contributions.reading import sign_amendment
from molora_fed.contributions.receive import admit_pending, receive_contribution
from molora_fed.contributions.store import BlobStore
from molora_fed.corpus.blocks import Blocks
from molora_fed.models.base import load_base
from molora_fed.plugins import load_plugins
from molora_fed.storage.files import canonical_json, hash_file
from molora_fed.storage.keys import build_public_pem, load_or_make_key, sign
from molora_fed.testing import build_random_adapter
from molora_fed.types import Split

BLOCK_SIZE = 16
open_base = cache(load_base)
open_plugins = cache(load_plugins)


def make_blocks(split, count, *, domain="legal", seed=0, vocabulary=257) -> Blocks:
    """Random blocks, a document each."""
    generator = np.random.default_rng([seed, count])
    tokens = generator.integers(0, vocabulary, (count, BLOCK_SIZE), dtype=np.int32)
    documents = np.repeat(np.arange(count, dtype=np.int32)[:, None], BLOCK_SIZE, axis=1)
    return Blocks(domain, split, tokens, documents, documents)


def edit_json(path: Path, change) -> None:
    """Change a JSON file in place."""
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(folder: Path, change) -> None:
    """Change an adapter's tensors in place; the config is left alone."""
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


class Door:
    """A cooperative's ledger and store, and whoever comes with uploads.

    Args:
        folder: Gets everything.
        checkpoint: The base's folder.
        rules: Of adapters.
    """

    def __init__(self, folder: Path, checkpoint: Path, **rules) -> None:
        self.folder = folder
        self.base = open_base(checkpoint)
        self.plugins = open_plugins()
        self.coordinator = load_or_make_key(folder / "coordinator.pem")
        self.charter = Charter(
            identity=Identity(
                version=2,
                name="tiny",
                base=self.base.whole_identity(),
                adapters=AdapterRules(**rules),
                corpus=CorpusRules(block_size=BLOCK_SIZE),
            ),
            amendment=Amendment(samples=SampleRules(calibration=4, admission=3, held_out=2)),
        )
        self.store = BlobStore(folder / "home" / "blobs")
        self.ledger_path = folder / "home" / "ledger.db"
        create_ledger(
            self.ledger_path,
            coordinator_key=build_public_pem(self.coordinator),
            first=self._sign(self.charter.amendment),
        )
        self.ledger = Ledger(self.ledger_path)

    def _sign(self, amendment):
        return sign_amendment(self.coordinator, self.charter.identity_hash, amendment)

    def amend(self, **changes) -> None:
        """Sign the next amendment; it counts at once."""
        number = self.charter.amendment.number + 1
        amendment = self.charter.amendment.model_copy(update={"number": number, **changes})
        self.ledger.add_amendment(self._sign(amendment), actor="test")
        self.charter = self.charter.model_copy(update={"amendment": amendment})

    def key(self, name):
        """A contributor's key."""
        return load_or_make_key(self.folder / "keys" / f"{name}.pem")

    def adapter(self, name="adapter", *, options=None, **settings) -> Path:
        """The folder of an adapter that changes next to nothing."""
        adapter = build_random_adapter(self.base.model, **{"strength": 1e-3, **settings})
        save_adapter(adapter, self.base.model, self.folder / "made" / name, options=options)
        return self.folder / "made" / name

    def contribute(self, name="legal-1", **changes) -> Path:
        """The folder of a contribution, good unless a change says otherwise."""
        domain = changes.get("domain", "legal")
        seed = sum(name.encode())
        arguments = {
            "kind": "lora",
            "samples": {s: make_blocks(s, 10, domain=domain, seed=seed) for s in Split},
            "key": self.key(name),
            "charter": self.charter,
            "contributor": name,
            "domain": domain,
            "training": {"steps": 10, "tokens": 320, "threads": 1},
            "base_loss": 3.0,
            "specialist_loss": 2.5,
            **changes,
        }
        if "adapter" not in arguments:
            arguments["adapter"] = self.adapter(f"of-{name}", seed=seed)
        return build_contribution(self.folder / "sent" / name, **arguments).folder

    def sign_again(self, folder: Path, name="legal-1", change=lambda manifest: None) -> Path:
        """Sign a changed folder as its contributor could: every file as it lies there now."""
        manifest = json.loads((folder / "manifest.json").read_bytes())
        entries = {
            **{f"adapter/{n}": e for n, e in manifest["adapter_files"].items()},
            **{f"samples/{s}.safetensors": e for s, e in manifest["sample_files"].items()},
        }
        for file, entry in entries.items():
            entry["sha256"] = hash_file(folder / file)
            entry["bytes"] = (folder / file).stat().st_size
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        try:
            signed = parse_manifest((folder / "manifest.json").read_bytes()).canonical
        except ValueError:
            signed = canonical_json(manifest)
        (folder / "signature").write_text(sign(self.key(name), signed) + "\n")
        return folder

    def receive(self, folder: Path, **changes):
        """What the server does with an upload."""
        arguments = {"charter": self.charter, "base": self.base, "plugins": self.plugins, **changes}
        return receive_contribution(self.ledger, self.store, folder, **arguments)

    def restart(self, **changes):
        """What the server does at its start with what is verified and not decided."""
        self.ledger.close()
        self.ledger = Ledger(self.ledger_path)
        arguments = {"charter": self.charter, "base": self.base, "plugins": self.plugins, **changes}
        return admit_pending(self.ledger, self.store, **arguments)

    def state(self, name="legal-1"):
        """Where a contributor's only contribution stands."""
        (entry,) = [e for e in self.ledger.contributions() if e.contributor == name]
        return entry.state


def fill(value):
    """Set every number of an adapter's B factors, or of its differences."""

    def change(tensors) -> None:
        for name, tensor in tensors.items():
            if "lora_A" not in name:
                tensor.fill_(value)

    return change


def write_raw(path: Path, header: dict, body: bytes) -> None:
    """A safetensors file of a header as it is given."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def to_torch(array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
