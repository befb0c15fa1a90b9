"""Learning rate over training: linear warm-up, constant, then 1 - sqrt decay (MHA2MLA's recipe).

A pure function of the step: nothing to save in a checkpoint, nothing that advances once per process.
"""

import math


def learning_rate_factor(step: int, steps: int, warmup_fraction: float, decay_fraction: float) -> float:
    """Share of the peak learning rate, in (0, 1], with which optimiser step `step` (from 0) of `steps` is taken."""
    warmup = round(warmup_fraction * steps)
    decay = round(decay_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    if step < steps - decay:
        return 1.0
    return 1.0 - math.sqrt((step - (steps - decay)) / decay)
