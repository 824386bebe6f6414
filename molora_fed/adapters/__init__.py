"""Adapters: kinds, file format, compatibility, algebra on the product B@A."""
