"""`molora` with the trivial study registered: `python molora_with_sums.py study sums`."""

import trivial_study
from molora_cli.main import main
from molora_studies.framework import registry

if __name__ == "__main__":
    found = registry.load_studies(extra=[("sums 1.0", trivial_study)])
    registry.get_studies = lambda: found
    main()
