"""A loss curve that can be looked at."""

import math


def smooth(losses: list[float]) -> list[float]:
    """Exponential average over about ten steps; a batch of 16 alone is too noisy. A loss that is no number (a step
    that was skipped, say) is left out."""
    result, average, weight = [], 0.0, 0.0
    for loss in losses:
        if not math.isnan(loss):
            average, weight = 0.9 * average + 0.1 * loss, 0.9 * weight + 0.1
        result.append(average / weight if weight else loss)
    return result
