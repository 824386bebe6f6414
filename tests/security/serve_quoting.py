"""`molora serve` with the quoting coordinator, as a process of its own: FOLDER PORT."""

import sys
from pathlib import Path

from molora_cli.live import watching

from molora_fed.federation import server as serving

if __name__ == "__main__":
    serving.COORDINATOR_MODULE = "quoting_coordinator"
    try:
        with watching("Cooperative") as board:
            serving.serve(Path(sys.argv[1]), int(sys.argv[2]), board)
    except KeyboardInterrupt:
        sys.exit(130)
