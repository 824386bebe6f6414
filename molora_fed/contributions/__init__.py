"""Contributions: keys, manifest, signature, admission, ledger."""
