"""Basics of every verb of `mmvit-data`: errors, files, output folders, workers, progress."""
