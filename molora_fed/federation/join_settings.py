"""Checks what a contributor joins with, before anything is started."""

import re
from dataclasses import replace
from pathlib import Path

from molora_fed.charter import load_charter
from molora_fed.corpus.documents import read_documents
from molora_fed.errors import CharterError, ConfigError
from molora_fed.federation.homes import ContributorHome, JoinSettings
from molora_fed.federation.mailbox import read_json
from molora_fed.plugins import get_plugins
from molora_fed.storage.keys import build_public_pem, key_fingerprint, load_or_make_key

__all__ = ["prepare_home", "prepare_settings"]

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_BASE_EXPERT = "base"


def prepare_home(home: ContributorHome, settings: JoinSettings) -> JoinSettings:
    """Make a home ready for its worker and its ClientApp: key, settings, no old news.

    Raises:
        MoloraError: What `prepare_settings` raises.
        StorageError: If the disk refuses.
    """
    prepared = prepare_settings(home, settings)
    home.board.prepare()
    for old in (home.refusal_letter, home.error_file, home.state_file):
        old.unlink(missing_ok=True)
    if _is_private(home):
        # The server says again what is published, or asks: the population may be growing.
        home.result_letter.unlink(missing_ok=True)
    return prepared


def _is_private(home: ContributorHome) -> bool:
    """Whether the charter of an earlier join says that texts stay where they are."""
    try:
        return load_charter(home.charter).amendment.is_private
    except CharterError:
        return False  # the first join


def prepare_settings(home: ContributorHome, settings: JoinSettings) -> JoinSettings:
    """Check the settings, make the key at the first join, and keep both in the home.

    Args:
        home: The contributor's home.
        settings: What to join with; an empty name becomes domain and start of the key.

    Returns:
        The settings with a name.

    Raises:
        ConfigError: If a name is malformed or reserved, the home belongs to another domain, or
            there is no adapter where one is said to be.
        CorpusError: If there is no readable text at the paths.
        UnknownNameError: If there are no paths, and nobody registers the domain.
        SignatureError: If the key cannot be used.
    """
    name = settings.name or f"{settings.domain}-000000"  # as long as the one to come
    for what, value in (("domain", settings.domain), ("name", name)):
        if not _NAME.fullmatch(value):
            raise ConfigError(
                f"Cannot join with {what} '{value}': expected lower-case letters, digits and "
                f"dashes, got something else. Choose another with --{what}."
            )
    if settings.name == _BASE_EXPERT:
        raise ConfigError(
            f"Cannot join with name '{_BASE_EXPERT}': expected another name, got that of the "
            "base in every report. Choose another with --name."
        )
    _check_first_domain(home, settings)
    _check_sources(settings)
    key = load_or_make_key(home.key)
    if not settings.name:
        fingerprint = key_fingerprint(build_public_pem(key))
        settings = replace(settings, name=f"{settings.domain}-{fingerprint[:6]}")
    settings.save(home.settings_file)
    return settings


def _check_first_domain(home: ContributorHome, settings: JoinSettings) -> None:
    earlier = read_json(home.settings_file)
    if earlier is None:
        return
    domain = JoinSettings.from_json(earlier).domain
    if domain != settings.domain:
        raise ConfigError(
            f"Cannot join in '{home.root}': expected domain '{domain}' as at the first join, got "
            f"'{settings.domain}'. Use another --home for another domain."
        )


def _check_sources(settings: JoinSettings) -> None:
    """Look at the text and the adapter as far as that takes no time."""
    if settings.data:
        next(read_documents([Path(path) for path in settings.data]))
    else:
        get_plugins().domains.entry(settings.domain)
    if settings.adapter and not Path(settings.adapter).is_dir():
        raise ConfigError(
            f"Cannot join with adapter '{settings.adapter}': expected a folder, got nothing "
            "there. Check the path."
        )
