"""What ends or protects a run: watching ranks, agreement, refused steps, signals."""
