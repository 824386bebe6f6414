"""Seeds derived from seeds: one for each place in a run, and none of them neighbours."""

import numpy as np

__all__ = ["derive_seed"]


def derive_seed(seed: int, *place: int) -> int:
    """The seed of a place in a run.

    Args:
        seed: Of the run, >= 0.
        place: Numbers that tell places apart, e.g. generation and slot, >= 0.

    Returns:
        Below 2**32; equal arguments give equal seeds.
    """
    return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0])
