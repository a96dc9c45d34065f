"""The tasks, each with its losses next to it."""
