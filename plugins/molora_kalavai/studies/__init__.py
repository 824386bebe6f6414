"""Studies of the paper's claims on local text; see docs/studies.md."""
