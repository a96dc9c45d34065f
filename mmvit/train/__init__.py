"""Training: one step, the loop, optimisers, schedules, logs. The only room that imports accelerate."""
