"""The base checkpoint: its files, layers, forward passes, precision and threads."""
