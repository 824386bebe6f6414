"""A coordinator's worker that refuses whoever is called "hostile", quoting a megabyte of it."""

import sys
import time
from pathlib import Path

from molora_fed.charter import load_charter
from molora_fed.federation.coordinator_mail import (
    acknowledge,
    complete_deliveries,
    publish_charter,
    publish_result,
)
from molora_fed.federation.homes import CoordinatorHome, message_bytes
from molora_fed.federation.letters import Summary
from molora_fed.federation.supervise import record_errors
from molora_fed.storage.files import write_json
from molora_fed.storage.keys import load_or_make_key


def work(home: CoordinatorHome) -> None:
    key, charter, size = load_or_make_key(home.key), load_charter(home.charter), message_bytes()
    publish_charter(home, charter, key, part_bytes=size)
    write_json(home.state_file, {"phase": "RECRUITING"})
    while True:
        for delivery in list(complete_deliveries(home, part_bytes=size)):
            is_hostile = delivery.name == "hostile"
            folder = home.received / delivery.name
            delivery.unpack(folder, part_bytes=size)
            acknowledge(
                delivery, key, contribution_id=delivery.shipment.id,
                state="QUARANTINED" if is_hostile else "ADMITTED",
                findings=[f"Cannot admit tensor '{'[/x]' * 250_000}'."] if is_hostile else [],
                part_bytes=size,
            )  # fmt: skip
            if not is_hostile:
                publish_result(
                    home, {"fused": folder}, Summary(contributions=[delivery.shipment.id]),
                    key=key, identity=charter.identity_hash, part_bytes=size,
                )  # fmt: skip
        time.sleep(0.2)


if __name__ == "__main__":
    coordinator = CoordinatorHome(Path(sys.argv[1]))
    with record_errors(coordinator.error_file):
        work(coordinator)
