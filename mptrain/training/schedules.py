"""Schedules of a training: learning rate, K, and how an mp coder encodes.

Train steps are counted from 0.
"""

import math

from mptrain.config.coder import CoderConfig
from mptrain.config.coder_settings import BeginAs, Schedule


def lr_factor(
    step: int,
    steps: int,
    warmup_share: float,
    schedule: Schedule = "linear",
    decay_share: float = 1.0,
) -> float:
    """Return the share of the peak learning rate at train step `step` of `steps`.

    Rises linearly over the first `warmup_share` of the steps, is 1 for one step at least, then
    falls to 0 over the last `decay_share` of the steps, or over all that are left.
    """
    warmup = min(round(warmup_share * steps), steps - 1)
    rise = (step + 1) / (warmup + 1)
    decay = max(1, min(round(decay_share * steps), steps - warmup))
    left = min(1.0, (steps - step) / decay)
    fall = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}
    return max(0.0, min(rise, fall[schedule]))


def k_at(config: CoderConfig, step: int, steps: int) -> int | None:
    """Return K at a train step: it falls linearly from `k_factor` K to K. None without K."""
    if config.k is None:
        return None
    decay = round(config.k_decay_share * steps)
    left = max(0.0, 1 - step / decay) if decay else 0.0
    return round(config.k * (1 + left * (config.k_factor - 1)))


def coded_as(config: CoderConfig, step: int, steps: int) -> BeginAs:
    """Return how an mp coder encodes at a train step."""
    return config.begin_as if step < round(config.begin_share * steps) else "mp"
