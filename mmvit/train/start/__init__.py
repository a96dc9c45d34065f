"""The model at the start of a run."""
