"""Models composed of towers, and `build`, the only place where a config becomes modules."""
