"""The verbs of a cooperative: create, contribute, admit, fuse, evolve, amend, audit."""
