"""Sums of vectors over members: masked, so that only the total is seen, or robust."""
