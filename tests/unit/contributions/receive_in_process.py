"""Receives one contribution in a process of its own, with an accident on the way.

python receive_in_process.py LEDGER CONTRIBUTION CHARTER ACCIDENT [LIMIT]

Admission is replaced by a fixed word, so that no model is needed.
"""

import os
import resource
import signal
import sys
from pathlib import Path

from molora_fed.charter import load_charter
from molora_fed.contributions import receive
from molora_fed.contributions.admission import Decision
from molora_fed.contributions.ledger import Ledger
from molora_fed.contributions.states import ContributionState
from molora_fed.contributions.store import BlobStore
from molora_fed.errors import MoloraError


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arrange(accident: str) -> None:
    """Let the process be killed at a moment, or let the disk take no more than so many bytes."""
    log = Ledger._log

    def die_at(what: str, state: str = "") -> None:
        def fatal(self, now, actor, event, subject, data):
            # In the middle of the transaction: the change is made, the commit is not.
            if event == what and data.get("to", "") == state:
                die()
            log(self, now, actor, event, subject, data)

        Ledger._log = fatal

    if accident == "first-commit":
        die_at("contribution-received")
    elif accident == "before-files":
        receive._store_files = die
    elif accident == "mid-file":
        put_file = BlobStore.put_file

        def fatal_put(self, path, **arguments):
            if path.name == "adapter_model.safetensors":
                (self.root / ".half.0123.tmp").write_bytes(path.read_bytes()[:100])
                die()
            put_file(self, path, **arguments)

        BlobStore.put_file = fatal_put
    elif accident == "verified-commit":
        die_at("contribution-changed", "VERIFIED")
    elif accident == "before-admission":
        receive.admit = die
    elif accident == "decision-commit":
        die_at("contribution-changed", "ADMITTED")
    elif accident == "before-receipt":
        receive._build_receipt = die
    elif accident == "disk-full":
        limit = int(sys.argv[5])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    elif accident != "none":
        sys.exit(f"unknown accident {accident}")


def main() -> None:
    ledger_path, folder = Path(sys.argv[1]), Path(sys.argv[2])
    receive.admit = lambda candidate: Decision(ContributionState.ADMITTED)
    arrange(sys.argv[4])
    try:
        with Ledger(ledger_path) as ledger:
            receipt = receive.receive_contribution(
                ledger,
                BlobStore(ledger_path.parent / "blobs"),
                folder,
                charter=load_charter(Path(sys.argv[3])),
                base=None,
            )
    except MoloraError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(receipt.state, receipt.known)


if __name__ == "__main__":
    main()
