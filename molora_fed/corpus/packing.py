"""Documents to blocks: tokens laid end to end, cut into blocks of equal length, no padding."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import CorpusError
from molora_fed.files import canonical_json, hash_bytes
from molora_fed.types import Document, Split

__all__ = ["fingerprint_encoding", "pack_documents", "tokenize_documents"]

_ORDER_SEED = 0


def fingerprint_encoding(tokenizer: Any) -> str:
    """SHA-256 of everything that decides which ids a text becomes (Hugging Face tokenizer)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = sorted(tokenizer.get_vocab().items())
        return hash_bytes(canonical_json([tokenizer.eos_token_id, vocabulary]))
    rules = json.loads(backend.to_str())
    # Left behind by the last call of anyone; every call sets them anew.
    rules.pop("truncation", None)
    rules.pop("padding", None)
    return hash_bytes(canonical_json([tokenizer.eos_token_id, rules]))


def tokenize_documents(documents: Sequence[Document], tokenizer: Any) -> list[NDArray[np.int32]]:
    """Token ids of each document, each ended by the end-of-text token.

    Args:
        documents: N documents; special tokens spelled out in their text stay text.
        tokenizer: Hugging Face tokenizer with an end-of-text token.

    Returns:
        N arrays of shape (number of tokens + 1,).

    Raises:
        CorpusError: If the tokenizer has no end-of-text token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise CorpusError(
            f"Cannot pack text with tokenizer '{tokenizer.name_or_path}': expected an end-of-text "
            "token, got none. Set eos_token in its tokenizer_config.json."
        )
    if not documents:
        return []
    encoded = tokenizer(
        [document.text for document in documents],
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    return [np.array([*ids, end], dtype=np.int32) for ids in encoded]


def pack_documents(
    documents: Sequence[Document],
    clusters: NDArray[np.int32],
    tokenizer: Any,
    *,
    domain: str,
    split: Split,
    block_size: int,
) -> Blocks:
    """Tokenise documents and pack them into blocks.

    The blocks come in a fixed random order, so that the first few of them, which is what a
    contributor sends as a sample, are drawn from all clusters. The last, incomplete block is
    left out.

    Args:
        documents: N documents.
        clusters: Cluster of each document, (N,).
        tokenizer: Hugging Face tokenizer with an end-of-text token.
        domain: Domain name, kept in the blocks.
        split: Split, kept in the blocks.
        block_size: T, tokens per block.

    Returns:
        Blocks whose `documents` are indices into `documents`; none if there are too few tokens.

    Raises:
        CorpusError: If the tokenizer has no end-of-text token.
    """
    tokens = tokenize_documents(documents, tokenizer)
    lengths = [len(ids) for ids in tokens]
    num_blocks = sum(lengths) // block_size
    owners = np.repeat(np.arange(len(documents), dtype=np.int32), lengths)
    flat = np.concatenate([np.empty(0, dtype=np.int32), *tokens])
    order = np.random.default_rng(_ORDER_SEED).permutation(num_blocks)

    def cut(row: NDArray[np.int32]) -> NDArray[np.int32]:
        return row[: num_blocks * block_size].reshape(num_blocks, block_size)[order]

    return Blocks(domain, split, cut(flat), cut(owners), cut(clusters.astype(np.int32)[owners]))
