"""Studies: questions answered by many small runs, planned, resumable, and written down."""
