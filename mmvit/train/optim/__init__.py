"""Optimisers, their state, schedules and the moving average of the weights."""
