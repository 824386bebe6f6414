"""Statistics of hidden states: what they are, and what is refused of a file from outside."""

import random

import numpy as np
import pytest
import torch
from fuzz_mutators import mutate_safetensors
from safetensors.torch import load_file, save_file

from molora_fed.errors import CorpusError
from molora_fed.models.hidden_statistics import (
    collect_statistics,
    compute_statistics_bytes,
    count_statistics,
    load_statistics,
)

WIDTH = 6


@pytest.fixture
def states():
    return torch.randn(10, 16, WIDTH, generator=torch.Generator().manual_seed(0)) * 3 + 2


@pytest.fixture
def path(states, tmp_path):
    collect_statistics("law", [states]).save(tmp_path / "statistics.safetensors")
    return tmp_path / "statistics.safetensors"


def load(path, width=WIDTH):
    return load_statistics(path, "law", who="ann", max_bytes=compute_statistics_bytes(width))


def test_they_are_number_mean_and_covariance_of_all_tokens(states, path):
    found, flat = load(path), states.flatten(0, 1).double().numpy()
    assert (found.domain, found.tokens, found.width) == ("law", 160, WIDTH)
    assert found.mean.numpy() == pytest.approx(flat.mean(axis=0), rel=1e-6)
    assert found.covariance.numpy() == pytest.approx(np.cov(flat.T, bias=True), rel=1e-5, abs=1e-6)
    pieces = collect_statistics("law", states.split(3))
    assert pieces.covariance.numpy() == pytest.approx(found.covariance.numpy(), rel=1e-6)


def test_equal_statistics_are_equal_bytes_within_what_is_said(states, path, tmp_path):
    collect_statistics("law", [states]).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert len(path.read_bytes()) <= compute_statistics_bytes(WIDTH)
    assert count_statistics(WIDTH) == 1 + WIDTH + WIDTH * (WIDTH + 1) // 2


def test_few_tokens_still_make_a_covariance_of_a_text(tmp_path):
    """Of lower rank than D, and rounded: no reason to refuse it here."""
    few = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1))
    collect_statistics("law", [few]).save(tmp_path / "few")
    assert load(tmp_path / "few", 64).tokens == 4


def change(name, edit):
    def run(tensors):
        tensors[name] = edit(tensors[name])

    return run


def make_indefinite(covariance):
    values, vectors = torch.linalg.eigh(covariance.double())
    values[0] = -0.01 * values[-1]
    found = (vectors * values) @ vectors.T
    return ((found + found.T) / 2).float()


def set_one(value):
    def run(tensor):
        tensor.flatten()[1] = value
        return tensor

    return run


HOSTILE = {
    "NaN": (change("mean", set_one(float("nan"))), "finite numbers in 'mean'"),
    "infinity": (change("covariance", set_one(float("inf"))), "finite numbers in 'covariance'"),
    "a mean beyond states": (change("mean", set_one(2e4)), "means of at most 10000"),
    "not symmetric": (change("covariance", set_one(0.5)), "a symmetric covariance"),
    "indefinite": (change("covariance", make_indefinite), "without negative eigenvalues"),
    "a negative variance": (change("covariance", lambda t: -t), "variances of 1e-12"),
    "no variance": (change("covariance", torch.zeros_like), "variances of 1e-12"),
    "a huge variance": (change("covariance", lambda t: t * 1e30), "to 1e+08"),
    "no tokens": (change("tokens", torch.zeros_like), "tokens, got 0"),
    "a negative count": (change("tokens", lambda t: -t), "tokens, got -160"),
    "a huge count": (change("tokens", lambda t: t + 2**62), "1 to 1,099,511,627,776 tokens"),
    "two counts": (change("tokens", lambda t: t.repeat(2)), "of their shapes"),
    "a count of another type": (change("tokens", lambda t: t.float()), "of their shapes"),
    "half precision": (change("covariance", lambda t: t.half()), "of their shapes"),
    "another width": (change("mean", lambda t: t[:-1]), "of their shapes"),
    "a mean of two rows": (change("mean", lambda t: t.reshape(2, -1)), "of their shapes"),
    "an extra tensor": (
        lambda t: t.update(text=torch.zeros(3)), "tensors covariance, mean, tokens",
    ),
    "none of a tensor": (lambda t: t.pop("mean"), "tensors covariance, mean, tokens"),
    "a tensor of control characters": (
        lambda t: t.update({"\x1b[2J\nname": torch.zeros(3)}), "tensors covariance, mean, tokens",
    ),
    "oversize": (lambda t: t.update(x=torch.zeros(9_999)), "at most 4,272 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_statistics_that_no_text_could_have_are_refused_in_one_line(path, name):
    edit, words = HOSTILE[name]
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    with pytest.raises(CorpusError, match=r"^Cannot read statistics of 'ann': expected ") as caught:
        load(path)
    said = str(caught.value)
    assert words in said and "\n" not in said and "\x1b" not in said and len(said) < 400


@pytest.mark.parametrize("data", [b"", b"\x80\x04.", b"PK\x03\x04" + b"0" * 99, b"\xff" * 64])
def test_what_is_no_safetensors_file_is_refused_in_one_line(path, data):
    path.write_bytes(data)
    with pytest.raises(CorpusError, match="expected a safetensors file, got") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(CorpusError, match="expected a file, got No such file"):
        load(path)


def test_changed_files_are_read_or_refused_in_one_line(path):
    good, refused = path.read_bytes(), 0
    for seed in range(400):
        path.write_bytes(mutate_safetensors(good, random.Random(seed)))
        try:
            assert load(path).covariance.isfinite().all()
        except CorpusError as error:
            refused += 1
            assert "\n" not in str(error) and "Build the contribution again" in str(error)
    assert refused > 200


def test_what_does_not_fit_the_cooperative_is_said(states):
    found = collect_statistics("law", [states])
    assert found.find_misfit(WIDTH, 160) is None
    assert found.find_misfit(WIDTH + 1, 160) == ("hidden states of 7 numbers, the base's", "6")
    assert found.find_misfit(WIDTH, 159) == ("48 to 159 tokens", "160")
    few = collect_statistics("law", [states[:2]])
    assert few.find_misfit(WIDTH, 160) == ("48 to 160 tokens", "32")
