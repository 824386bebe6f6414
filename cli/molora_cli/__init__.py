"""The `molora` command: one file a verb, no logic."""
