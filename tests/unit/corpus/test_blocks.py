"""Blocks survive the disk, know their document starts, and bad files are refused."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from molora_fed.corpus.blocks import Blocks, load_blocks
from molora_fed.errors import CorpusError
from molora_fed.types import Split


def build_blocks(n=3, t=8):
    tokens = np.arange(n * t, dtype=np.int32).reshape(n, t)
    documents = (tokens // 5).astype(np.int32)
    return Blocks("legal", Split.HELD_OUT, tokens, documents, documents // 2)


def test_round_trip(tmp_path):
    blocks = build_blocks()
    blocks.save(tmp_path / "b.safetensors")
    again = load_blocks(tmp_path / "b.safetensors")
    assert again.fingerprint == blocks.fingerprint
    assert (again.domain, again.split) == ("legal", Split.HELD_OUT)
    np.testing.assert_array_equal(again.clusters, blocks.clusters)


def test_document_starts_at_every_block_and_every_new_document():
    starts = build_blocks(2, 8).document_starts
    assert starts.tolist() == [
        [True, False, False, False, False, True, False, False],
        [True, False, True, False, False, False, False, True],
    ]


def test_take_is_a_prefix():
    assert len(build_blocks(3).take(2)) == 2
    assert len(build_blocks(3).take(9)) == 3


@pytest.mark.parametrize("damage", ["truncated", "pickle", "extra", "dtype", "missing"])
def test_bad_files_are_refused_in_one_line(tmp_path, damage):
    path = tmp_path / "b.safetensors"
    blocks = build_blocks()
    blocks.save(path)
    arrays = {n: getattr(blocks, n) for n in ("tokens", "documents", "clusters")}
    metadata = {"blocks": '{"domain": "legal", "split": "held-out"}'}
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "pickle":
        path.write_bytes(b"\x80\x04\x95garbage that is no safetensors")
    elif damage == "extra":
        save_file({**arrays, "text": arrays["tokens"]}, path, metadata)
    elif damage == "dtype":
        save_file({n: a.astype(np.float32) for n, a in arrays.items()}, path, metadata)
    else:
        path.unlink()
    with pytest.raises(CorpusError) as caught:
        load_blocks(path)
    assert "\n" not in str(caught.value)


def test_equal_blocks_are_equal_bytes():
    assert len({build_blocks().to_bytes() for _ in range(20)}) == 1


def test_too_large_a_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "b.safetensors"
    build_blocks().save(path)
    with pytest.raises(CorpusError, match="at most 100 bytes"):
        load_blocks(path, max_bytes=100)
