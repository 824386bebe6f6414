"""A plugin's kinds of adapter through the commands: accepted, trained, admitted, fused."""

import json
import shutil
from pathlib import Path

import own_kinds
import pytest

from molora_fed.adapters.files import load_meta
from molora_fed.plugins import get_plugins


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The plugin, as pip would leave it."""
    place = tmp_path / "packages"
    metadata = place / "own_kinds-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    shutil.copy(Path(own_kinds.__file__), place / "installed_kinds.py")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: own-kinds\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text("[molora_fed]\nown = installed_kinds\n")
    monkeypatch.syspath_prepend(str(place))
    get_plugins.cache_clear()
    yield
    get_plugins.cache_clear()


def test_kinds_of_a_plugin_from_founding_to_the_fused_model(
    molora, setup, installed, tiny_checkpoint, tmp_path
):
    home = tmp_path / "tiny"
    create = ("coop", "create", "tiny", "--base", tiny_checkpoint(), "--folder", home, "--steps")
    create += (12, "--kind", "row-scales", "--block-size", 32, "--privacy", "pooled")
    refused = molora(*create)
    assert refused.code != 0 and not home.exists()
    assert "a training kind among lora, svd, delta (--accept-kinds, at creation)" in refused.err
    unknown = molora(*create, "--accept-kinds", "lora,row-scale")
    assert unknown.code == 61 and not home.exists()
    assert "'row-scale': expected one of delta, lora, row-scales, svd, whole-weights" in unknown.err
    assert molora(*create, "--accept-kinds", "lora,row-scales,whole-weights").code == 0

    folders = {"row-scales": tmp_path / "abc", "whole-weights": tmp_path / "xyz"}
    for (kind, out), (domain, texts) in zip(folders.items(), setup.texts.items(), strict=True):
        train = ("train", "--cooperative", home, "--domain", domain, "--data", texts, "--out", out)
        ran = molora(*train, "--kind", kind, "--threads", 1, "--name", f"{domain}-1")
        assert ran.code == 0 and f"({kind}): validation loss" in ran.out
        again = molora(*train, "--kind", kind, "--threads", 1, "--name", f"{domain}-1")
        assert again.code == 0  # what is finished is read back
    other = molora(*train[:-1], tmp_path / "no", "--kind", "svd")
    assert other.code != 0 and "lora, row-scales, whole-weights" in other.err

    admitted = molora("coop", "admit", home, *folders.values())
    assert admitted.code == 0 and admitted.out.count("ADMITTED") == 2
    assert molora("fuse", "--cooperative", home).code == 0
    used = json.loads((home / "result.json").read_text())
    assert "own-kinds" in json.dumps(used["plugins"])
    stored = [load_meta(home / "fused" / "adapters" / name, name) for name in ("abc-1", "xyz-1")]
    assert [meta.kind for meta in stored] == list(folders)
    said = molora("generate", home / "fused", "--prompt", "abcd abcd", "--max-new-tokens", 4)
    assert said.code == 0, said.err
