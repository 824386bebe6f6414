"""Atomic files, locks, keys, settings."""
