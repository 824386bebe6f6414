"""The mail-carrying run: a Flower app that holds no code, only where the installed code is."""

import tomli_w

from molora_fed.errors import FederationError
from molora_fed.federation.fleet import Fleet
from molora_fed.federation.homes import CoordinatorHome
from molora_fed.federation.supervise import build_flower_environment, parse_answer, run_command
from molora_fed.storage.files import write_bytes

__all__ = ["submit_run"]

_PROJECT = {
    "project": {
        "name": "molora-fed",
        "version": "0.1.0",
        "description": "Mailboxes of molora-fed; the code is the installed package.",
        "license": "Apache-2.0",
        "dependencies": [],
    },
    "tool": {
        "flwr": {
            "app": {
                "publisher": "molora",
                "components": {
                    "serverapp": "molora_fed.federation.server_app:app",
                    "clientapp": "molora_fed.federation.client_app:app",
                },
            }
        }
    },
}


def submit_run(home: CoordinatorHome, address: str, fleet: Fleet) -> None:
    """Start the mail-carrying run on a SuperLink.

    Args:
        home: The coordinator's home; the app's folder and Flower's settings are made below it.
        address: "HOST:PORT" of the SuperLink.
        fleet: Which nodes it has.

    Raises:
        FederationError: If Flower refuses it.
        StorageError: If the disk refuses.
    """
    flower = home.root / "flower"
    write_bytes(flower / "app" / "pyproject.toml", tomli_w.dumps(_PROJECT).encode())
    connection = {"default": "local", "local": {"address": address, "insecure": True}}
    write_bytes(flower / "config.toml", tomli_w.dumps({"superlink": connection}).encode())
    log = home.logs / "run.log"
    command = ["flwr", "run", str(flower / "app"), "local", "--format", "json", *fleet.run_options]
    env = build_flower_environment(home.root, **fleet.environment)
    answer = parse_answer(run_command(command, env=env, log=log))
    # The exit status is 0 even on failure.
    if answer.get("success") is not True:
        raise FederationError(
            "Cannot start the mail-carrying run: expected success, got "
            f"{str(answer.get('error-message', 'no answer'))[:200]}. See {log}."
        )
