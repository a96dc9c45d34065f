"""The model as a run begins."""
