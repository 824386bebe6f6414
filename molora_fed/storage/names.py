"""Names of contributors, domains and cooperatives."""

import re

from molora_fed.errors import ConfigError
from molora_fed.types import BASE_EXPERT

__all__ = ["check_name", "is_name"]

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def is_name(value: str) -> bool:
    """Whether a domain, contributor or cooperative may have this name."""
    return _NAME.fullmatch(value) is not None


def check_name(what: str, value: str) -> None:
    """Refuse a name that no contribution can hold, before any work is done.

    Args:
        what: "name" for a contributor's, or "domain"; also the option to choose it with.
        value: The name.

    Raises:
        ConfigError: If it is malformed, or a contributor's is reserved.
    """
    if not is_name(value):
        raise ConfigError(
            f"Cannot use {what} '{value}': expected lower-case letters, digits and dashes, got "
            f"something else. Choose another with --{what}."
        )
    if what == "name" and value == BASE_EXPERT:
        raise ConfigError(
            f"Cannot use name '{value}': expected another name, got that of the base in every "
            "report. Choose another with --name."
        )
