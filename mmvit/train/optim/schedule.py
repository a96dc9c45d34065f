"""The learning rate schedule: a function of the step, without state to save."""

import math

from mmvit.config import OptimConfig


def schedule_factor(step: int, num_steps: int, config: OptimConfig) -> float:
    """Return the factor of the peak learning rates at `step` (from 0).

    Linear warm-up over `warmup_share`, flat, then a decay over `decay_share` to 0 at `num_steps`: "cosine", "linear",
    or "sqrt", the cooldown 1 - sqrt(x) (Haegele et al. 2024, section 3). A `decay_share` of 0 keeps the rate constant.
    "inverse_sqrt" falls with the square root of the steps after the warm-up (Vaswani et al. 2017, section 5.3), never
    to 0. Its decay depends on `num_steps` only through the warm-up, and not on `decay_share`.
    """
    warmup = config.warmup_share * num_steps
    rise = min(1.0, (step + 1) / (warmup + 1))
    if config.decay == "inverse_sqrt":
        return min(rise, math.sqrt((warmup + 1) / (step + 1)))
    decay_start = _decay_start(num_steps, config)
    done = max(0.0, (step - decay_start) / max(1.0, num_steps - decay_start))
    falls = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "sqrt": 1 - math.sqrt(done)}
    return rise * falls[config.decay]


def schedule_phase(step: int, num_steps: int, config: OptimConfig) -> str:
    """Return the phase of the schedule at `step` (from 0): warm-up, constant or decay."""
    warmup = config.warmup_share * num_steps
    if step < warmup:
        return "warm-up"
    decay_start = warmup if config.decay == "inverse_sqrt" else _decay_start(num_steps, config)
    return "constant" if step < decay_start else "decay"


def _decay_start(num_steps: int, config: OptimConfig) -> float:
    return max(num_steps * (1 - config.decay_share), config.warmup_share * num_steps)
