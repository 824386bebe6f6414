"""The server's process with nodes that Ray simulates on this machine: no port of Flower's at all.

    python -P -m molora_fed.federation.flower.simulated HOME --nodes N --actors K

Server and client app are the installed package's. Ray listens on the loopback address for its own
processes; they show a token that only this user can read.
"""

import argparse
import os
import sys

from flwr.simulation.run_simulation import _run_simulation
from flwr.supercore.telemetry import EventType

from molora_fed.federation import client_app, server_app


def _simulate(nodes: int, actors: int) -> None:
    """Carry the mail of simulated nodes until the stop file is there."""
    _run_simulation(
        num_supernodes=nodes,
        exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
        client_app=client_app.app,
        server_app=server_app.app,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": actors},
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("home", help="Only seen in the process list; the environment names it.")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--actors", type=int, required=True)
    given = parser.parse_args()
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    _simulate(given.nodes, given.actors)
    sys.stdout.flush()
