"""Founding a cooperative: everything is checked first, then the base is made or fetched."""

import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from molora_fed.charter import AdapterRules, Amendment, BaseIdentity, CorpusRules, PrivacyRules
from molora_fed.cooperative.cooperative import (
    Cooperative,
    build_charter,
    check_charter_names,
    create_cooperative,
)
from molora_fed.cooperative.pins import build_pins
from molora_fed.corpus.builtin import DEFAULT_DOMAINS
from molora_fed.corpus.documents import open_domain
from molora_fed.corpus.overlap import copy_index
from molora_fed.errors import CharterError, ConfigError, MoloraError
from molora_fed.models.base import Base, fetch_base
from molora_fed.models.runtime import Placement
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.storage.files import make_home
from molora_fed.storage.names import is_name
from molora_fed.training.builtin_base import BuiltinBaseConfig, create_builtin_base
from molora_fed.types import Progress

__all__ = ["BUILTIN_SOURCE", "found_cooperative"]

BUILTIN_SOURCE = "builtin"
_UNKNOWN = "0" * 64  # stands for fingerprints while there is no base yet


def found_cooperative(
    folder: Path,
    name: str,
    *,
    source: str = BUILTIN_SOURCE,
    adapters: AdapterRules | None = None,
    corpus: CorpusRules | None = None,
    amendment: Amendment | None = None,
    privacy: PrivacyRules | None = None,
    base_steps: int | None = None,
    placement: Placement | None = None,
    cache: Path | None = None,
    plugins: Plugins | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
    progress: Progress | None = None,
) -> tuple[Cooperative, Base]:
    """Make a cooperative with its base; safe to interrupt, run again to resume.

    Args:
        folder: The coordinator's home.
        name: Lower-case letters, digits and dashes.
        source: "builtin", "ID@REVISION" on the Hugging Face Hub, or a folder.
        adapters: What an adapter may be.
        corpus: How text becomes blocks.
        amendment: What may change later; number 0.
        privacy: What leaves contributors; the usual if None.
        base_steps: Training steps of the built-in base; its default if None.
        placement: Device and dtype of a fetched base in memory; the CPU and float32 if None. The
            charter is the same.
        cache: Folder in which built-in bases are kept for other cooperatives.
        plugins: Where names are looked up; the installed plugins by default.
        on_phase: Told what begins, for people.
        progress: Receives progress of making the base.

    Returns:
        The cooperative and its base.

    Raises:
        CharterError: If a value cannot stand in a charter, or the folder holds another
            cooperative.
        UnknownNameError: If a router, kind or check is registered by nobody.
        PluginError: If a plugin that the charter names cannot be pinned.
        BaseCheckpointError: If the base cannot be made or fetched.
        ComputeError: If it is larger than the memory there is.
        CorpusError: If a domain of the built-in base has too little text.
        StorageError: On I/O errors.
    """
    plugins = plugins or get_plugins()
    corpus, amendment = corpus or CorpusRules(), amendment or Amendment()
    unknown = BaseIdentity(
        id=source,
        weights=_UNKNOWN,
        tokenizer=_UNKNOWN,
        config=_UNKNOWN,
        files={"config.json": _UNKNOWN},
    )
    _check_domains(name, amendment.domains)
    draft = build_charter(name, unknown, adapters, corpus, amendment, privacy)
    check_charter_names(draft, plugins)
    build_pins(draft, plugins)  # refused now, not after the base is made
    is_new = not folder.exists()
    make_home(folder)
    if source == BUILTIN_SOURCE:
        domains = _choose_domains(amendment, plugins)
        on_phase(f"reading text of {', '.join(domains)}")
        documents = {domain: read() for domain, read in domains.items()}
        config = BuiltinBaseConfig(
            seed=amendment.seed, block_size=corpus.block_size, split_seed=corpus.split_seed
        )
        if base_steps is not None:
            config = replace(config, steps=base_steps)
        on_phase("training the built-in base")
        base = create_builtin_base(
            folder / "base", documents, config=config, cache=cache, progress=progress
        )
    else:
        on_phase(f"fetching base {source}")
        try:
            base = fetch_base(source, folder / "base", placement, progress)
        except MoloraError:
            if is_new:
                with suppress(OSError):
                    folder.rmdir()  # nothing of a base that was refused is there
            raise
        copy_index(Path(source), folder / "base")
    try:
        cooperative = create_cooperative(
            folder,
            name,
            base,
            adapters=adapters,
            corpus=corpus,
            amendment=amendment,
            privacy=privacy,
            plugins=plugins,
        )
    except CharterError:
        if is_new:
            shutil.rmtree(folder)  # the base alone is no cooperative, and nothing else is there
        raise
    return cooperative, base


def _check_domains(name: str, domains: Iterable[str]) -> None:
    """Refuse domains that no contribution can name.

    Raises:
        CharterError: Naming all of them.
    """
    wrong = [domain for domain in domains if not is_name(domain)]
    if wrong:
        raise CharterError(
            f"Cannot create cooperative '{name}': expected domains of lower-case letters, digits "
            f"and dashes, got {', '.join(map(repr, wrong))}. Rename these."
        )


def _choose_domains(amendment: Amendment, plugins: Plugins) -> Mapping[str, Callable[[], Any]]:
    """Readers of the registered domains among those asked for; the built-in four if none is.

    One that cannot be read without options of a contributor's is left to its contributors.
    """
    known, found = set(plugins.domains.names()), {}
    for domain in sorted(known.intersection(amendment.domains)):
        with suppress(ConfigError):
            found[domain] = open_domain(domain, plugins)
    return found or {domain: open_domain(domain, plugins) for domain in sorted(DEFAULT_DOMAINS)}
