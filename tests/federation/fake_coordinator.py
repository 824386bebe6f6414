"""A coordinator's worker that admits everything and fuses nothing."""

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
    key = load_or_make_key(home.key)
    charter = load_charter(home.charter)
    size = message_bytes()
    publish_charter(home, charter, key, part_bytes=size)
    write_json(home.state_file, {"phase": "RECRUITING"})
    received = home.root / "received"
    admitted: set[str] = set()
    while True:
        for delivery in list(complete_deliveries(home, part_bytes=size)):
            delivery.unpack(received / delivery.name, part_bytes=size)
            acknowledge(
                delivery, key, contribution_id=delivery.shipment.id, state="ADMITTED",
                findings=[], part_bytes=size,
            )  # fmt: skip
            admitted.add(delivery.shipment.id)
            names = sorted(path.name for path in received.iterdir())
            if len(names) == charter.amendment.expected:
                folders = {name: received / name for name in names}
                summary = Summary(contributions=sorted(admitted))
                publish_result(
                    home, folders, summary, key=key, identity=charter.identity_hash,
                    part_bytes=size,
                )  # fmt: skip
                write_json(home.state_file, {"phase": "PUBLISHED"})
        time.sleep(0.2)


if __name__ == "__main__":
    coordinator = CoordinatorHome(Path(sys.argv[1]))
    with record_errors(coordinator.error_file):
        work(coordinator)
