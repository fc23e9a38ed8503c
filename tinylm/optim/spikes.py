"""The spike guard (training.skip_spikes): which optimizer steps are skipped.

A bad batch, or weights that begin to diverge, show as a loss or a gradient norm far above those of
the last steps. Such a step is a spike: its value is above

    median + factor · max(1.4826 · MAD, 1% of the median)        over the last 100 steps

MAD is the median distance to the median. 1.4826 · MAD estimates the standard deviation of normal
values, and unlike it is not moved by the outliers that it is to find (Rousseeuw and Croux 1993). A
step with a value that is not a finite number is always a spike. Skipped steps do not enter the
band: a loss that stays high is an error after `MAX_IN_A_ROW` steps, not a new normal.

Plain numbers in, a sentence out; the history is kept in the progress of the run, which each
checkpoint stores, so that a resumed run skips the same steps.
"""

import math
from statistics import median

WINDOW = 100  # steps
MIN_STEPS = 20  # before so many, a step has no band to be compared with
MAX_IN_A_ROW = 10
MAD_TO_STD = 1.4826  # 1 / the upper quartile of the normal distribution
MIN_SPREAD = 0.01  # of the median: the spread of values that hardly differ


def spike_in(
    values: dict[str, float], history: list[list[float]], factor: float | None
) -> str | None:
    """What is wrong with `values`, the loss and the gradient norm of a step; None if nothing is.

    Args:
        values: by name.
        history: the values of the last steps, in the same order.
        factor: training.skip_spikes; None: only a value that is not finite is wrong.

    >>> history = [[2.0, 1.0], [2.1, 1.0], [1.9, 1.0]] * 7
    >>> spike_in({"loss": 2.4, "gradient norm": 1.0}, history, 6)
    >>> spike_in({"loss": 4.0, "gradient norm": 1.0}, history, 6)
    'the loss is 4, above 2.89, the limit by the last 21 steps (median 2)'
    """
    for name, value in values.items():
        if not math.isfinite(value):
            return f"the {name} is {value}"
    if factor is None or len(history) < MIN_STEPS:
        return None
    for (name, value), recent in zip(values.items(), zip(*history, strict=True), strict=True):
        middle = median(recent)
        mad = median(abs(old - middle) for old in recent)
        limit = middle + factor * max(MAD_TO_STD * mad, MIN_SPREAD * abs(middle))
        if value > limit:
            band = f"the limit by the last {len(history)} steps (median {middle:.4g})"
            return f"the {name} is {value:.4g}, above {limit:.4g}, {band}"
    return None
