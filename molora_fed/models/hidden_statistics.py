"""Statistics of the base's last hidden states over one contributor's text, and their file.

A contributor publishes them with its adapter, so that routers can be made without its text: enough
for a linear discriminant of domains, and of all the text at once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from molora_fed.errors import CorpusError
from molora_fed.models.runtime import limit_threads
from molora_fed.storage.files import write_bytes
from molora_fed.storage.untrusted import clean

__all__ = [
    "MIN_CLUSTERS",
    "TOKENS_PER_WIDTH",
    "HiddenStatistics",
    "collect_statistics",
    "compute_statistics_bytes",
    "count_statistics",
    "load_statistics",
]

TOKENS_PER_WIDTH: Final = 8
"""Tokens that statistics are over, for each coordinate of a hidden state: the covariance of fewer
tokens than coordinates spans those tokens' own states."""
MIN_CLUSTERS: Final = 4
"""Documents that statistics are over, near-duplicates counted as one."""
LARGEST_STATE = 1e4
"""A coordinate of a hidden state beyond counts as this much."""
_MAX_HEADER_BYTES = 4_096
_DTYPES = {"covariance": "F32", "mean": "F32", "tokens": "I64"}
_ROUNDED = 1e-5  # of the largest variance: what float32 may take from a covariance
_LEAST_VARIANCE = 1e-12
_MAX_TOKENS = 2**40


@dataclass(frozen=True, eq=False)
class HiddenStatistics:
    """Number, mean and covariance of the hidden states h of one text; nothing of its documents.

    Attributes:
        domain: Domain of the text, as its contributor signed.
        tokens: N.
        mean: Mean of h, (D,) float32.
        covariance: Sum of (h - mean)(h - mean)^T over tokens, / N, (D, D) float32.
    """

    domain: str
    tokens: int
    mean: Tensor
    covariance: Tensor

    @property
    def width(self) -> int:
        """D."""
        return len(self.mean)

    def save(self, path: Path) -> None:
        """Write the file that is published; equal statistics give equal bytes.

        Raises:
            StorageError: On I/O errors.
        """
        tensors = {"covariance": self.covariance, "mean": self.mean}
        write_bytes(path, save({**tensors, "tokens": torch.tensor([self.tokens])}))

    def find_misfit(self, width: int, most_tokens: int) -> tuple[str, str] | None:
        """What a cooperative expects of statistics and what these are; None if they fit.

        Args:
            width: D of the cooperative's base.
            most_tokens: Tokens of all calibration blocks that the charter asks for.
        """
        least = TOKENS_PER_WIDTH * width
        if self.width != width:
            return f"hidden states of {width} numbers, the base's", f"{self.width}"
        if not least <= self.tokens <= most_tokens:
            return f"{least:,} to {most_tokens:,} tokens", f"{self.tokens:,}"
        return None


def collect_statistics(domain: str, states: Iterable[Tensor]) -> HiddenStatistics:
    """Statistics of hidden states, the same bits however many threads there are.

    Args:
        domain: Domain of the text.
        states: Hidden states of some blocks each, (B, T, D); one token at least.
    """
    tokens, first, second = 0, torch.zeros(()), torch.zeros(())
    with limit_threads(1), torch.no_grad():
        for hidden in states:
            flat = hidden.double().cpu().clamp(-LARGEST_STATE, LARGEST_STATE).flatten(0, 1)
            tokens += len(flat)
            first = first + flat.sum(dim=0)
            second = second + flat.T @ flat
        mean = first / tokens
        covariance = second / tokens - torch.outer(mean, mean)
    symmetric = (covariance + covariance.T).div(2).float().contiguous()
    return HiddenStatistics(domain, tokens, mean.float(), symmetric)


def count_statistics(width: int) -> int:
    """Numbers in statistics of states of `width` numbers; the file has most of them twice."""
    return 1 + width + width * (width + 1) // 2


def compute_statistics_bytes(width: int) -> int:
    """Largest file of statistics of hidden states of `width` numbers."""
    return 4 * (width**2 + width) + 8 + _MAX_HEADER_BYTES


def load_statistics(path: Path, domain: str, *, who: str, max_bytes: int) -> HiddenStatistics:
    """Read statistics from outside.

    Args:
        path: The file.
        domain: Domain of the text, as its contributor signed.
        who: Whose they are, for errors.
        max_bytes: Larger files are not opened.

    Raises:
        CorpusError: If the file is missing, too large or malformed, or no text could have such
            statistics: a number is not finite, the covariance is not symmetric or has a negative
            eigenvalue beyond rounding.
    """

    def refuse(expected: str, got: object) -> CorpusError:
        return CorpusError(
            f"Cannot read statistics of '{clean(who)}': expected {expected}, got "
            f"{clean(got, 100)}. Build the contribution again."
        )

    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise refuse(f"at most {max_bytes:,} bytes", f"{size:,}")
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            # By the header, before torch makes room for anything.
            parts = {name: file.get_slice(name) for name in names[: len(_DTYPES) + 1]}
            found = {n: (part.get_dtype(), tuple(part.get_shape())) for n, part in parts.items()}
            shape = found.get("mean", ("", ()))[1]
            width = shape[0] if len(shape) == 1 else 0
            shapes = {"covariance": (width, width), "mean": (width,), "tokens": (1,)}
            wanted = {name: (dtype, shapes[name]) for name, dtype in _DTYPES.items()}
            if width < 1 or found != wanted:
                raise refuse(f"tensors {', '.join(sorted(_DTYPES))} of their shapes", found)
            tensors = {name: file.get_tensor(name) for name in names}
    except OSError as error:
        raise refuse("a file", error.strerror) from error
    except (SafetensorError, ValueError) as error:
        if isinstance(error, CorpusError):
            raise
        raise refuse("a safetensors file", error) from error
    fault = _find_fault(tensors)
    if fault is not None:
        raise refuse(*fault)
    return HiddenStatistics(domain, int(tensors["tokens"]), tensors["mean"], tensors["covariance"])


def _find_fault(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """What statistics of a text have and what these have; None if a text could have them."""
    tokens, mean, covariance = int(tensors["tokens"]), tensors["mean"], tensors["covariance"]
    if not 1 <= tokens <= _MAX_TOKENS:
        return f"1 to {_MAX_TOKENS:,} tokens", f"{tokens:,}"
    for name in ("mean", "covariance"):
        if not bool(tensors[name].isfinite().all()):
            return f"finite numbers in '{name}'", "NaN or infinity"
    if float(mean.abs().max()) > LARGEST_STATE:
        return f"means of at most {LARGEST_STATE:g} in size", f"{float(mean.abs().max()):.4g}"
    if not torch.equal(covariance, covariance.T):
        return "a symmetric covariance", "another"
    most, largest = float(covariance.diagonal().max()), LARGEST_STATE**2
    if not _LEAST_VARIANCE <= most <= largest:
        return f"variances of {_LEAST_VARIANCE:g} to {largest:g}", f"{most:.4g}"
    slack = _ROUNDED * most * torch.eye(len(covariance), dtype=torch.float64)
    if int(torch.linalg.cholesky_ex(covariance.double() + slack).info):
        return "a covariance without negative eigenvalues", "one with some, beyond rounding"
    return None
