"""Memory of a fusion by its number of experts, each measured in a fresh process.

`python -m molora_studies.kalavai.twenty_memory COOPERATIVE FOLDER COUNT` fuses the first COUNT
admitted contributions once more in FOLDER, finding the bank's columns where they are, writes the
report, and leaves `memory.json` there.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molora_fed.contributions.contributed import collect_contributed
from molora_fed.contributions.receive import load_admitted
from molora_fed.cooperative.cooperative import open_cooperative
from molora_fed.cooperative.known_text import read_known_text
from molora_fed.errors import StudyError
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.status import measure_peak_bytes
from molora_fed.fusion.fuse import fuse
from molora_fed.models.base import load_base
from molora_fed.reporting.report import write_report
from molora_fed.storage.files import write_json

__all__ = ["measure_memory"]

_FILE = "memory.json"
_LOOK_SECONDS = 0.01


def measure_memory(cooperative: Path, folder: Path, count: int) -> dict[str, Any]:
    """Fuse the first contributions in a process of its own.

    Args:
        cooperative: A coordinator's home whose ledger nobody writes meanwhile.
        folder: Where to fuse; made, and left behind.
        count: How many contributions.

    Returns:
        `peak_bytes`, the largest resident memory of the process; `private_bytes`, the largest
        without pages of mapped files, which the system takes back when it needs them (Linux;
        else the same); `start_bytes` before the fusion began; and processor `seconds`.

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


def _read_private_bytes() -> int:
    """Resident memory of this process that is no file's, bytes."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return measure_peak_bytes()


@contextmanager
def _watching_private_bytes() -> Iterator[list[int]]:
    """A list whose only number is the largest value seen in the block; the kernel keeps none."""
    seen = [_read_private_bytes()]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_LOOK_SECONDS):
            seen[0] = max(seen[0], _read_private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()


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
    texts = read_known_text(cooperative.folder)
    chosen = [
        collect_contributed(one, corpus=texts.get(one.manifest.contributor))
        for one in admitted[:count]
    ]
    with _watching_private_bytes() as private:
        fused = fuse(base, cooperative.charter, chosen, folder)
        write_report(fused.result, {}, folder / "report")
    measured = {
        "start_bytes": before,
        "peak_bytes": measure_peak_bytes(),
        "private_bytes": private[0],
        "seconds": time.process_time() - start,
    }
    write_json(folder / _FILE, measured)


if __name__ == "__main__":
    _fuse_first(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
