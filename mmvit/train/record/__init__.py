"""What a run writes: logs, trackers, curves, bad samples, its folder, checkpoints."""
