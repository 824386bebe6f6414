"""Held-out losses, gains and their intervals."""
