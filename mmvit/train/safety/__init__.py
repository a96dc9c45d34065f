"""Protection of a run: monitoring of ranks, agreement between them, skipped steps, signals."""
