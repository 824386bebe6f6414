"""The query about a contributor's held-out blocks, from its own key.

Both ends of a contribution's life open the same query: the manifest commits to it when the
contribution is signed, and each fusion sends it.
"""

from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from molora_fed.corpus.blocks import Blocks
from molora_fed.corpus.overlap import list_shingles
from molora_fed.privacy.intersection import Receiver
from molora_fed.privacy.messages import BATCH, MAX_QUERY_BATCHES
from molora_fed.privacy.oprf import derive_bytes
from molora_fed.types import Progress

__all__ = ["open_receiver"]

_KEY_BYTES = 48  # of P-384


def open_receiver(
    held_out: Blocks,
    tokenizer: Any,
    *,
    key: EllipticCurvePrivateKey,
    identity: str,
    name: str,
    progress: Progress | None = None,
) -> Receiver | None:
    """The receiver of a contributor's held-out blocks; equal arguments, equal query.

    Its secret follows from the signing key, which does not follow from it: in a dispute the secret
    can be shown.

    Args:
        held_out: Its blocks.
        tokenizer: Hugging Face tokenizer they were made with.
        key: The contributor's signing key.
        identity: The charter's identity hash.
        name: The contributor's name.
        progress: Called with elements made of all.

    Returns:
        None if the blocks have more word 8-grams than a query takes.
    """
    items = list_shingles(held_out, tokenizer)
    if items.size > MAX_QUERY_BATCHES * BATCH:
        return None
    signing = key.private_numbers().private_value.to_bytes(_KEY_BYTES, "big")
    secret = derive_bytes(32, signing, b"held-out query", identity.encode(), name.encode())
    return Receiver(items, secret=secret, purpose=f"held-out blocks of {name}", progress=progress)
