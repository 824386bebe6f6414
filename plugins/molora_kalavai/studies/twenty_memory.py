"""Memory of a fusion by its number of experts, each measured in a fresh process.

`python -m molora_kalavai.studies.twenty_memory COOPERATIVE FOLDER COUNT` fuses the first COUNT
admitted contributions once more in FOLDER, finding the bank's columns where they are, and leaves
`memory.json` there.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from molora_fed.base import load_base
from molora_fed.contributions.receive import load_admitted
from molora_fed.cooperative import open_cooperative
from molora_fed.errors import StudyError
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.usage import measure_peak_bytes
from molora_fed.files import write_json
from molora_fed.fusion import fuse
from molora_fed.fusion_plan import collect_contributed

__all__ = ["measure_memory"]

_FILE = "memory.json"


def measure_memory(cooperative: Path, folder: Path, count: int) -> dict[str, Any]:
    """Fuse the first contributions in a process of its own.

    Args:
        cooperative: A coordinator's home whose ledger nobody writes meanwhile.
        folder: Where to fuse; made, and left behind.
        count: How many contributions.

    Returns:
        `peak_bytes` of the process, `start_bytes` before the fusion began, and `seconds`.

    Raises:
        StudyError: If the process fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = read_json(folder / _FILE)
    if found is None:
        command = [sys.executable, "-m", __name__, str(cooperative), str(folder), str(count)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
        found = read_json(folder / _FILE)
        if done.returncode or found is None:
            raise StudyError(
                f"Cannot measure the memory of fusing {count}: expected the process to end well, "
                f"got exit status {done.returncode}. Look into the task's log."
            )
    return dict(found)


def _fuse_first(cooperative_folder: Path, folder: Path, count: int) -> None:
    cooperative = open_cooperative(cooperative_folder)
    bank = folder / "bank"
    if not bank.exists():
        bank.symlink_to(cooperative.folder.absolute() / "bank", target_is_directory=True)
    with cooperative.read_ledger() as ledger:
        admitted = load_admitted(ledger, cooperative.store)
    base = load_base(cooperative.base_folder)
    before = measure_peak_bytes()
    start = time.process_time()
    fuse(
        base,
        cooperative.charter,
        [collect_contributed(contribution) for contribution in admitted[:count]],
        folder,
    )
    measured = {
        "start_bytes": before,
        "peak_bytes": measure_peak_bytes(),
        "seconds": time.process_time() - start,
    }
    write_json(folder / _FILE, measured)


if __name__ == "__main__":
    _fuse_first(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
