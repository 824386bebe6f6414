"""What a contributor states about the model its training started from."""

from collections.abc import Mapping
from typing import Any

from molora_fed.charter import Charter
from molora_fed.contributions.building import choose_samples
from molora_fed.corpus.blocks import Blocks
from molora_fed.evaluation import compute_block_losses
from molora_fed.types import Split

__all__ = ["measure_start_loss"]


def measure_start_loss(
    model: Any, samples: Mapping[Split, Blocks], charter: Charter, *, domain: str
) -> float:
    """Loss of the model that training starts from on the very blocks that admission measures on.

    Args:
        model: The model before its first step, as this machine has it.
        samples: Blocks by split, shape (N, T), as given to `build_contribution`.
        charter: The cooperative's charter.
        domain: Domain of the blocks.

    Returns:
        Nats per token, for the manifest's `start_loss`.

    Raises:
        CorpusError: If blocks of a split the charter asks for are missing.
    """
    chosen = choose_samples(samples, charter, domain=domain)
    losses = compute_block_losses(
        model,
        chosen[Split.ADMISSION].tokens,
        batch=charter.identity.corpus.evaluation_batch,
    )
    return float(losses.double().mean())
