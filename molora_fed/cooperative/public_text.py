"""The coordinator's own public text of a domain: what newcomers are measured on where none is sent.

It stays with the coordinator, is in no fusion, and decides nothing for good: whoever is worse on it
than on the base is quarantined until somebody looks.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from molora_fed.contributions.admission import locate_public_text
from molora_fed.cooperative.cooperative import Cooperative
from molora_fed.corpus.blocks import Blocks, pack_documents
from molora_fed.corpus.documents import check_domain_options, open_domain, read_documents
from molora_fed.errors import CorpusError, describe_mismatch
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.storage.names import check_name
from molora_fed.types import Split

__all__ = ["MAX_PUBLIC_BLOCKS", "keep_public_text"]

MIN_PUBLIC_BLOCKS = 8
"""Below this a loss says more about the text than about the adapter."""
MAX_PUBLIC_BLOCKS = 64
"""What a newcomer is measured on at most; two passes, the base's among them."""


def keep_public_text(
    cooperative: Cooperative,
    domain: str,
    data: Sequence[Path] = (),
    *,
    options: Mapping[str, Any] | None = None,
    plugins: Plugins | None = None,
) -> Blocks:
    """Keep text of a domain in the coordinator's home; it replaces the one that was there.

    Args:
        cooperative: Whose newcomers of that domain are measured on it.
        domain: Name of the domain.
        data: Files and folders of text; empty takes the registered domain of that name.
        options: Options of the registered domain.
        plugins: Where domains are registered; the installed plugins by default.

    Returns:
        The blocks that are kept, of the charter's size.

    Raises:
        ConfigError: If no contribution can name the domain, or it does not know its options.
        CorpusError: If there is too little text, or it cannot be read.
        StorageError: On I/O errors.
        UnknownNameError: If there are no data and nobody registers the domain.
    """
    check_name("domain", domain)
    check_domain_options(domain, data, options)
    tokenizer = cooperative.load_base().tokenizer
    if data:
        documents = list(read_documents(data, tokenizer=tokenizer))
    else:
        documents = list(open_domain(domain, plugins or get_plugins(), options)())
    packed = pack_documents(
        documents,
        np.arange(len(documents), dtype=np.int32),
        tokenizer,
        domain=domain,
        split=Split.ADMISSION,
        block_size=cooperative.charter.identity.corpus.block_size,
    )
    if len(packed) < MIN_PUBLIC_BLOCKS:
        raise CorpusError(
            describe_mismatch(
                f"Cannot keep public text of '{domain}'",
                expected=f"at least {MIN_PUBLIC_BLOCKS} blocks of {packed.block_size} tokens",
                got=f"{len(packed)} of {len(documents)} documents",
                fix="Add text.",
            )
        )
    blocks = packed.take(MAX_PUBLIC_BLOCKS)
    blocks.save(locate_public_text(cooperative.public_folder, domain))
    return blocks
