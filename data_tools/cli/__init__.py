"""The `mmvit-data` program."""
