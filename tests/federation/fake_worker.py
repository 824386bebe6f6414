"""A contributor's worker that trains nothing: offers random bytes, takes the result."""

import os
import sys
import time
from pathlib import Path

from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.supervise import record_errors
from molora_fed.federation.worker_mail import (
    offer_contribution,
    receive_base,
    receive_charter,
    receive_result,
)
from molora_fed.storage.files import replace_folder, write_json

CONTRIBUTION_BYTES = 2_000_000


def wait_for(look):
    while (found := look()) is None:
        time.sleep(0.2)
    return found


def work(home: ContributorHome) -> None:
    def report(phase: str) -> None:
        write_json(home.state_file, {"phase": phase, "pid": os.getpid()})

    report("JOINING")
    wait_for(lambda: receive_charter(home))
    wait_for(lambda: receive_base(home) or None)
    wait_for(lambda: home.list_tasks() or None)
    report("TRAINING")
    if not (home.contribution / "adapter.bin").exists():
        time.sleep(1.0)
        seed = home.read_settings().name.encode()
        with replace_folder(home.contribution) as folder:
            (folder / "adapter.bin").write_bytes((seed * CONTRIBUTION_BYTES)[:CONTRIBUTION_BYTES])
            (folder / "samples").mkdir()
            (folder / "samples" / "a.bin").write_bytes(seed)
    shipment = offer_contribution(home)
    report("SUBMITTING")
    wait_for(
        lambda: (
            (read_json(home.acknowledgement_letter) or {}).get("shipment") == shipment.id or None
        )
    )
    report("ADMITTED")
    wait_for(lambda: receive_result(home) or None)
    report("DONE")


if __name__ == "__main__":
    contributor = ContributorHome(Path(sys.argv[1]))
    with record_errors(contributor.error_file):
        work(contributor)
