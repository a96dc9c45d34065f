"""The whole pipeline in one call."""
