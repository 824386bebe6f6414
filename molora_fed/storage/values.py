"""Values that people type as options of several commands. Imports nothing heavy."""

import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from molora_fed.errors import ConfigError

__all__ = [
    "count_cores",
    "find_cache_folder",
    "find_settings_folder",
    "parse_data",
    "parse_names",
    "parse_options",
    "parse_shard",
]


def find_cache_folder() -> Path:
    """Where built-in bases are kept for all cooperatives of this user.

    `MOLORA_CACHE` if it is set, else `molora-fed` in the user's cache folder.
    """
    if own := os.environ.get("MOLORA_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "molora-fed"


def find_settings_folder() -> Path:
    """Where settings of this user are kept.

    `MOLORA_CONFIG` if it is set, else `molora-fed` in the user's folder of settings.
    """
    if own := os.environ.get("MOLORA_CONFIG"):
        return Path(own)
    shared = os.environ.get("XDG_CONFIG_HOME")
    return (Path(shared) if shared else Path.home() / ".config") / "molora-fed"


def count_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parse_names(text: str) -> tuple[str, ...]:
    """Names separated by commas, in their order, each once.

    Raises:
        ConfigError: If one is empty.
    """
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ConfigError(
            f"Cannot use names '{text}': expected names separated by commas, got an empty one. "
            "Write them like python,science."
        )
    return tuple(dict.fromkeys(names))


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Options by name from KEY=VALUE; values are TOML, a bare word is text.

    Raises:
        ConfigError: If one is malformed, or a key comes twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, separator, value = (part.strip() for part in text.partition("="))
        if not separator or not key or key in found:
            raise ConfigError(
                f"Cannot use option '{text}': expected KEY=VALUE with every key once, got "
                "something else. Write it like precision=int8."
            )
        try:
            found[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[key] = value
    return found


def parse_data(values: Iterable[str]) -> dict[str, tuple[Path, ...]]:
    """Files and folders by domain, from NAME=PATH; a name may come several times.

    Raises:
        ConfigError: If one is malformed, or a path does not exist.
    """
    data: dict[str, tuple[Path, ...]] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or not name.strip() or not path.strip():
            raise ConfigError(
                f"Cannot use data '{value}': expected NAME=PATH, got something else. "
                "Write it like legal=texts/legal."
            )
        if not Path(path).exists():
            raise ConfigError(
                f"Cannot use data of domain '{name}': expected a file or folder at '{path}', got "
                "nothing there. Check the path."
            )
        data[name.strip()] = (*data.get(name.strip(), ()), Path(path))
    return data


def parse_shard(text: str) -> tuple[int, int]:
    """A share of a domain, from "2/3" (the second of three) to (1, 3).

    Raises:
        ConfigError: If it is malformed or out of range.
    """
    number, _, count = text.partition("/")
    if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number) - 1, int(count)
    raise ConfigError(
        f"Cannot use shard '{text}': expected I/N with 1 <= I <= N, got something else. "
        "Write 2/3 for the second of three contributors who share a domain."
    )
