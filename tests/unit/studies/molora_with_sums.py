"""`molora` with the trivial study registered: `python molora_with_sums.py study sums`."""

import trivial_study
from molora_cli.main import main

from molora_fed import plugins

if __name__ == "__main__":
    found = plugins.load_plugins(extra=[("sums 1.0", trivial_study)])
    plugins.get_plugins = lambda: found
    main()
