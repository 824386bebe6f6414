"""Receives one contribution in a process of its own, with an accident on the way.

Admission is replaced by a fixed word, so that no model is needed.
"""

import os
import resource
import signal
import sys
from pathlib import Path

from molora_fed.charter import load_charter
from molora_fed.contributions import receive
from molora_fed.contributions.admission import AdmissionDecision
from molora_fed.contributions.ledger import Ledger
from molora_fed.contributions.states import ContributionState
from molora_fed.contributions.store import BlobStore
from molora_fed.errors import MoloraError


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arrange(accident: str, limit: int | None) -> None:
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
        receive.build_receipt = die
    elif accident == "disk-full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    else:
        sys.exit(f"unknown accident {accident}")


def receive_with_accident(
    ledger_path: Path, folder: Path, charter: Path, accident: str, limit: int | None = None
) -> None:
    """Receive a contribution; its process ends with the error's exit code, or is killed."""
    receive.admit = lambda candidate, **_: AdmissionDecision(ContributionState.ADMITTED)
    arrange(accident, limit)
    try:
        with Ledger(ledger_path) as ledger:
            receipt = receive.receive_contribution(
                ledger,
                BlobStore(ledger_path.parent / "blobs"),
                folder,
                charter=load_charter(charter),
                base=None,
            )
    except MoloraError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(receipt.state, receipt.known)
