import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000


@dataclass(frozen=True)
class Measure:
    """A number and its 95% interval."""

    value: float
    low: float
    high: float


def mean(values: Sequence[float], *, seed: int = 0) -> Measure:
    """The mean of the values of at least one example, each from 0 to 1, and its 95% interval.

    Of values that are 0 or 1 it is Wilson's, which holds near the ends and for few examples too; of others a bootstrap's.
    """
    array = np.asarray(values, dtype=np.float64)
    value = float(array.mean())
    if set(values) <= {0, 1}:
        return Measure(value, *wilson(value, len(array)))
    draw = np.random.default_rng(seed)
    return Measure(
        value, *_middle_95([float(draw.choice(array, len(array)).mean()) for _ in range(RESAMPLES)])
    )


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95% interval of a proportion seen in `n` trials (Wilson 1927).

    >>> [round(end, 4) for end in wilson(0.0, 10)], [round(end, 4) for end in wilson(0.5, 100)]
    ([0.0, 0.2775], [0.4038, 0.5962])
    """
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return max(0.0, min(share, centre - half)), min(
        1.0, max(share, centre + half)
    )  # rounding must not leave the share outside


def _middle_95(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


# The normal distribution holds 95% within so many standard deviations.
Z95 = 1.959963984540054
