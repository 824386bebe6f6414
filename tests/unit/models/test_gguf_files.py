"""A base from a GGUF file: what comes out, and what is refused."""

import numpy as np
import pytest
import torch
from gguf_helpers import write_tiny_gguf
from safetensors import safe_open

from molora_fed.errors import BaseCheckpointError, ConfigError
from molora_fed.models import gguf_files
from molora_fed.models.base import fetch_base, load_base
from molora_fed.models.forward import compute_block_losses


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "Tiny-Llama.Q4_1.gguf")


def test_a_gguf_file_becomes_a_plain_base_in_bfloat16(gguf_file, tmp_path, capfd):
    base = fetch_base(str(gguf_file), tmp_path / "base")
    assert base.id == "Tiny-Llama.Q4_1"
    assert base.revision.endswith("dequantised from Q4_1, saved in bfloat16")
    with safe_open(tmp_path / "base/model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert "quantization" not in (tmp_path / "base/config.json").read_text()
    tokens = np.array([base.tokenizer("Words and more words")["input_ids"]], dtype=np.int32)
    assert torch.isfinite(compute_block_losses(base.model, tokens)).all()
    assert capfd.readouterr().err == ""


def test_everyone_who_converts_a_file_has_the_same_base(gguf_file, tmp_path):
    one, two = (fetch_base(str(gguf_file), tmp_path / name) for name in ("one", "two"))
    assert (
        one.whole_identity() == two.whole_identity() == load_base(tmp_path / "one").whole_identity()
    )
    before = (tmp_path / "one/model.safetensors").stat().st_mtime_ns
    assert fetch_base(str(gguf_file), tmp_path / "one").weights == one.weights
    assert (tmp_path / "one/model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("kept", [0, 3, 40, 5_000, 60_000])
def test_a_file_that_is_cut_short_is_one_line_and_leaves_nothing(gguf_file, tmp_path, kept):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes()[:kept])
    with pytest.raises(BaseCheckpointError, match=r"'.*cut\.gguf': expected a whole GGUF") as found:
        fetch_base(str(cut), tmp_path / "base")
    assert "\n" not in str(found.value) and not (tmp_path / "base").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.gguf"]


def test_another_file_is_not_put_over_a_base(gguf_file, tmp_path):
    fetch_base(str(gguf_file), tmp_path / "base")
    other = tmp_path / "other.gguf"
    other.write_bytes(gguf_file.read_bytes())
    with pytest.raises(BaseCheckpointError, match="expected an empty or absent folder"):
        fetch_base(str(other), tmp_path / "base")


def test_without_the_package_it_says_what_to_install(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install molora-fed\[gguf\]"):
        fetch_base(str(gguf_file), tmp_path / "base")
