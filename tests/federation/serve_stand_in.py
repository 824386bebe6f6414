"""`molora serve` with a stand-in worker, as a process of its own: FOLDER PORT [tls]."""

import sys
from pathlib import Path

from molora_fed.federation import server as serving

if __name__ == "__main__":
    serving.COORDINATOR_MODULE = "fake_coordinator"
    try:
        serving.serve(
            Path(sys.argv[1]),
            int(sys.argv[2]),
            lambda event: print(event, flush=True),
            names=() if sys.argv[3:] == ["tls"] else None,
        )
    except KeyboardInterrupt:
        sys.exit(130)
