"""Which learning rates are tried."""

import math
from typing import Callable


def next_rate(rate: str, upwards: bool) -> str:
    """The next number of 1, 2, 5, 10, 20, 50, … (and below 1 likewise) beyond a rate."""
    value = float(rate)
    exponent = math.floor(math.log10(value))
    series = [f"{digit}e{power}" for power in (exponent - 1, exponent, exponent + 1) for digit in (1, 2, 5)]
    near = 1e-6 * value  # what is meant to be the same number may differ in its last digit
    if upwards:
        return next(text for text in series if float(text) > value + near)
    return next(text for text in reversed(series) if float(text) < value - near)


def search(rates: list[str], most_added: int, measure: Callable[[str], float]) -> dict[str, float]:
    """What was measured at each rate, least rate first. While the best one is an end of the grid, a rate beyond it is
    added, `most_added` at most; a grid of fewer than three rates is taken as it is. `measure` gives infinity for what
    failed."""
    losses = {rate: measure(rate) for rate in sorted(rates, key=float)}
    wanted = len(losses) + most_added if len(losses) > 2 else len(losses)
    while len(losses) < wanted and at_end(losses):
        rate = best(losses)
        beyond = next_rate(rate, upwards=rate == list(losses)[-1])
        losses[beyond] = measure(beyond)
        losses = dict(sorted(losses.items(), key=lambda item: float(item[0])))
    return losses


def best(losses: dict[str, float]) -> str:
    """The rate with the least loss; of equal ones, as of all that failed, the lowest."""
    return min(losses, key=lambda rate: losses[rate])


def at_end(losses: dict[str, float]) -> bool:
    return best(losses) in (next(iter(losses)), list(losses)[-1])
