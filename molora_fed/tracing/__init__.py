"""Append-only hash-chained traces of decisions: written, sealed, verified, proved."""
