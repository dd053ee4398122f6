"""The learning rate of a step."""

import math


def one_cycle(step: int, total_steps: int, peak: float) -> float:
    """Return the rate at a step: from peak / 25 up in the first fifth, down to peak / 10,000.

    Both along a cosine: the one-cycle schedule (Smith and Topin, "Super-Convergence", 2018).
    """
    rise_steps = max(1.0, 0.2 * total_steps)
    if step < rise_steps:
        low, progress = peak / 25, step / rise_steps
    else:
        low, progress = peak / 1e4, 1 - (step - rise_steps) / max(1.0, total_steps - 1 - rise_steps)
    return low + (peak - low) * (1 - math.cos(math.pi * progress)) / 2
