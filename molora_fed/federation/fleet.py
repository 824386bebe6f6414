"""Which nodes a server has: contributors' own, or nodes simulated on this machine.

A simulated node is a partition id of Flower; `partitions.json` says which contributor's home that
is. Imports neither torch nor flwr.
"""

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molora_fed.errors import FederationError
from molora_fed.federation.homes import HOLD_SECONDS
from molora_fed.federation.mailbox import read_json
from molora_fed.storage.files import write_bytes, write_json

__all__ = [
    "NOT_A_MEMBER",
    "PARTITIONS",
    "WRONG_CLOCK",
    "Fleet",
    "connect_fleet",
    "find_own_home",
    "read_partitions",
    "simulate_fleet",
    "write_partitions",
    "write_ray_token",
]

PARTITIONS = "MOLORA_PARTITIONS"
"""Environment variable of simulated ClientApps: file with the contributors' homes, in order."""
NOT_A_MEMBER = 77
"""Exit status of a contributor's node whose key the server does not take."""
WRONG_CLOCK = 78
"""Exit status of a contributor's node whose key it takes, but not the time that it signs."""


@dataclass(frozen=True)
class Fleet:
    """The process that carries mail to a kind of nodes.

    Attributes:
        module: What it runs.
        options: Its arguments after the coordinator's home.
        environment: Further environment of it and all it starts.
        is_served: Whether it answers on the server's port.
        farewell_seconds: How long it may take to end by itself.
    """

    module: str
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    is_served: bool = True
    farewell_seconds: float = 0.5


def connect_fleet(host: str, port: int, *, names: Sequence[str] | None) -> Fleet:
    """Contributors' nodes, which connect by themselves.

    Args:
        host: Address to listen on.
        port: Port to listen on.
        names: Names by which members reach the server, over TLS; None takes whoever is on this
            machine, over plain HTTP.
    """
    mode = ("--open",) if names is None else ("--names", *names)
    return Fleet("molora_fed.federation.flower.link", (host, str(port), *mode))


def simulate_fleet(partitions: Path, *, nodes: int, actors: int, scratch: Path) -> Fleet:
    """Nodes simulated by Ray, on this machine only.

    Args:
        partitions: File written by `write_partitions`.
        nodes: Number of nodes: one a home, and one for everyone who may still join.
        actors: Processes that answer their letters.
        scratch: Folder of Ray's own files. The system allows about 100 characters for the paths
            of sockets, and Ray needs 60 of them below this folder.
    """
    return Fleet(
        module="molora_fed.federation.flower.simulated",
        options=("--nodes", str(nodes), "--actors", str(actors)),
        environment={
            PARTITIONS: str(partitions),
            # An answer held back would hold one of a few actors, and everybody else's letters.
            HOLD_SECONDS: "0",
            "RAY_TMPDIR": str(scratch),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Letters are short, and whoever trains beside them would have all cores.
            "RAY_worker_niceness": "0",
            # Without clusters, Ray listens on the loopback address instead of the machine's.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_ADDRESS": "",
            # Whoever reaches Ray's ports without the token could run programs.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(write_ray_token(scratch)),
        },
        is_served=False,
        farewell_seconds=15.0,
    )


def write_ray_token(scratch: Path) -> Path:
    """Make the token that Ray's processes show each other, for this user alone.

    Raises:
        StorageError: On I/O errors.
    """
    path = scratch / "token"
    write_bytes(path, secrets.token_hex(32).encode(), mode=0o600)
    return path


def write_partitions(path: Path, homes: Sequence[Path]) -> None:
    """Note which home belongs to which partition id.

    Raises:
        StorageError: On I/O errors.
    """
    write_json(path, {"homes": [str(home.absolute()) for home in homes]})


def read_partitions(path: Path) -> list[Path]:
    """The homes by partition id.

    Raises:
        FederationError: If there is no such file, or it is malformed.
    """
    try:
        return [Path(home) for home in read_json(path)["homes"]]
    except (KeyError, TypeError) as error:
        raise FederationError(
            f"Cannot read partitions '{path}': expected a list of homes, got {error!r}. "
            "Start the simulation again."
        ) from error


def find_own_home(node_config: Mapping[str, Any]) -> Path | None:
    """The home that a simulated node answers for.

    Args:
        node_config: The node's configuration, from Flower's context.

    Returns:
        The home; None for a node whose contributor has not joined yet.

    Raises:
        FederationError: If the partitions cannot be read.
    """
    homes = read_partitions(Path(os.environ.get(PARTITIONS, "")))
    number = int(node_config["partition-id"])
    return homes[number] if number < len(homes) else None
