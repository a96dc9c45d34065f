"""Training: one step, the loop, optimizers, schedules, logs. The only package that imports accelerate."""
