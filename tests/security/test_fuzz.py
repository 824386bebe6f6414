"""Every entry point takes changed files: it reads them, or refuses them in one line.

`bench/fuzz.py` does the same for hours, guided by coverage; what it found is repeated here.
"""

import random
from pathlib import Path

import pytest
from fuzz_targets import TARGETS

from molora_fed.errors import MoloraError

FOUND = Path(__file__).parents[1] / "data" / "fuzz"


def refuses_in_one_line(run, data):
    try:
        run(data)
    except MoloraError as error:
        assert "\n" not in str(error) and len(str(error)) < 5_000


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_changed_files_are_read_or_refused_in_one_line(target, tmp_path):
    seeds, run = target.prepare(tmp_path)
    for seed in seeds:
        run(seed)
    chance = random.Random(target.name)
    for _ in range(target.inputs):
        data = target.mutate(chance.choice(seeds), chance)
        refuses_in_one_line(run, data)
    for path in sorted(FOUND.glob(f"{target.name}-*")):
        refuses_in_one_line(run, path.read_bytes())
