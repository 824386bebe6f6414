"""Which nodes a SuperLink has: contributors' own SuperNodes, or nodes simulated on this machine.

A simulated node is a partition id of Flower; `partitions.json` says which contributor's home that
is. Imports neither torch nor flwr.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molora_fed.errors import FederationError
from molora_fed.federation.homes import CONTRIBUTOR_HOME, HOLD_SECONDS, home_from_environment
from molora_fed.federation.mailbox import read_json
from molora_fed.storage.files import write_json

__all__ = [
    "CONNECTED",
    "PARTITIONS",
    "Fleet",
    "find_own_home",
    "read_partitions",
    "simulate_fleet",
    "write_partitions",
]

PARTITIONS = "MOLORA_PARTITIONS"
"""Environment variable of simulated ClientApps: file with the contributors' homes, in order."""


@dataclass(frozen=True)
class Fleet:
    """How a SuperLink is started and a run submitted for a kind of nodes.

    Attributes:
        superlink_options: Further arguments of `flower-superlink`.
        run_options: Further arguments of `flwr run`.
        environment: Further environment of all of Flower's processes.
        farewell_seconds: How long the nodes may take to end after the run.
    """

    superlink_options: tuple[str, ...] = ()
    run_options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    farewell_seconds: float = 0.5


CONNECTED = Fleet()
"""SuperNodes of contributors connect by themselves."""


def simulate_fleet(partitions: Path, *, nodes: int, actors: int, scratch: Path) -> Fleet:
    """Nodes simulated by Ray, on this machine only.

    Args:
        partitions: File written by `write_partitions`.
        nodes: Number of nodes: one a home, and one for everyone who may still join.
        actors: Processes that answer their letters.
        scratch: Folder of Ray's own files. The system allows about 100 characters for the paths
            of sockets, and Ray needs 60 of them below this folder.
    """
    federation = f"num-supernodes={nodes} client-resources-num-cpus=1 init-args-num-cpus={actors}"
    return Fleet(
        superlink_options=("--simulation",),
        run_options=("--federation-config", federation),
        environment={
            PARTITIONS: str(partitions),
            # An answer held back would hold one of a few actors, and everybody else's letters.
            HOLD_SECONDS: "0",
            "RAY_TMPDIR": str(scratch),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Without clusters, Ray listens on the loopback address instead of the machine's.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_ADDRESS": "",
        },
        farewell_seconds=15.0,
    )


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
    """The home a ClientApp answers for: its partition's in a simulation, else the one set.

    Args:
        node_config: The node's configuration, from Flower's context.

    Returns:
        The home; None for a simulated node whose contributor has not joined yet.

    Raises:
        ConfigError: If none is set.
        FederationError: If the partitions cannot be read.
    """
    partitions = os.environ.get(PARTITIONS, "")
    if not partitions:
        return home_from_environment(CONTRIBUTOR_HOME)
    homes = read_partitions(Path(partitions))
    number = int(node_config["partition-id"])
    return homes[number] if number < len(homes) else None
