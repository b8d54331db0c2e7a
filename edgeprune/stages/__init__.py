"""The stages of a run: each is skipped when what it made is still right, and builds on the file before."""
