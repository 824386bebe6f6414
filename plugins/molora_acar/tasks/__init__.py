"""Procedural tasks with checkable answers, and problems to train on that are never tested."""
