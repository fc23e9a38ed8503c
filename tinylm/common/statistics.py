"""Means with their 95% confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

N_RESAMPLES = 1000
Z95 = 1.959963984540054
"""95% of a normal distribution is within this many standard deviations of its mean"""


@dataclass(frozen=True)
class Measure:
    """A number and its 95% confidence interval."""

    value: float
    low: float
    high: float


def mean(values: Sequence[float], *, seed: int = 0) -> Measure:
    """The mean of the values, one from 0 to 1 for each of at least one example,
    with its 95% interval.

    The interval is Wilson's if all values are 0 or 1, which holds near the ends and for few
    examples too; else a bootstrap.
    """
    array = np.asarray(values, dtype=np.float64)
    value = float(array.mean())
    if set(values) <= {0, 1}:
        return Measure(value, *wilson(value, len(array)))
    draw = np.random.default_rng(seed)
    means = [float(draw.choice(array, len(array)).mean()) for _ in range(N_RESAMPLES)]
    return Measure(value, *middle_95(means))


def middle_95(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The interval that holds the middle 95% of the values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95% interval of a proportion observed in `n` trials (Wilson 1927).

    >>> [round(end, 4) for end in wilson(0.0, 10)], [round(end, 4) for end in wilson(0.5, 100)]
    ([0.0, 0.2775], [0.4038, 0.5962])
    """
    scale = 1 + Z95**2 / n
    center = (share + Z95**2 / (2 * n)) / scale
    half = Z95 / scale * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    # rounding must not leave the share outside
    low = max(0.0, min(share, center - half))
    high = min(1.0, max(share, center + half))
    return low, high
