"""The files that a run writes: logs, trackers, curves, invalid samples, its folder, checkpoints."""
