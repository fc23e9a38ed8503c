"""The learning rate over the steps, as pure functions: the same step always gives the same number.

    1 ┤    ╭──────╮               1 ┤    ╭───────────╮          1 ┤    ╭────╮
      │   ╱        ╲                │   ╱             ╲           │   ╱     └───┐
      │  ╱          ╲               │  ╱               ╲          │  ╱          └────┐
    0 ┼─╱────────────╰──          0 ┼─╱─────────────────╲       0 ┼─╱────────────────└─
       warmup, cosine                warmup, wsd (stable, decay)   warmup, plateau

`multiplier` is the fraction of the peak learning rate at a step; `should_stop` decides whether
validation has stopped improving. Both are computed from the step and all validation losses so far,
so a resumed run has no state to restore. Knows nothing of optimizers: `optimizers.set_lr` applies
the number.
"""

import math
from collections.abc import Sequence

from tinylm.config.schema import TrainingConfig


def multiplier(step: int, training: TrainingConfig, val_losses: Sequence[float] = ()) -> float:
    """The fraction of the peak learning rate, in [0, 1], at `step`, counted from 0.

    All schedules but `constant` rise linearly from 0 at step 0 to 1 at step round(warmup_ratio ·
    max_steps); after that comes the function named like the schedule. Only `plateau` reads
    `val_losses`, all so far, oldest first.

    >>> settings = TrainingConfig(max_steps=100, warmup_ratio=0.1, min_lr_ratio=0.1)
    >>> [round(multiplier(step, settings), 3) for step in (0, 5, 10, 55, 100, 1000)]
    [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]
    """
    last, lowest = training.max_steps, training.min_lr_ratio
    if training.schedule == "constant":
        return 1.0
    # Warmup: Adam's running means are still noisy, and a full step would follow the noise.
    warmup_steps = round(training.warmup_ratio * last)
    if step < warmup_steps:
        return step / warmup_steps
    if training.schedule == "plateau":
        return plateau(val_losses, training.plateau_patience, training.plateau_factor, lowest)
    if step >= last:
        return lowest
    if training.schedule == "wsd":
        # Warmup, stable, decay. Rounding both ratios may make warmup and decay overlap by a step.
        decay_start = last - round(training.decay_ratio * last)
        return linear(step, max(warmup_steps, decay_start), last, lowest)
    return cosine(step, warmup_steps, last, lowest)


def cosine(step: int, start: int, end: int, lowest: float) -> float:
    """From 1 at `start` to `lowest` at `end` along half a cosine
    (Loshchilov and Hutter 2017, equation 5).
    """
    progress = (step - start) / (end - start)
    return lowest + 0.5 * (1 + math.cos(math.pi * progress)) * (1 - lowest)


def linear(step: int, start: int, end: int, lowest: float) -> float:
    """1 until `start`, then linearly to `lowest` at `end` (the decay of WSD, Hu et al. 2024)."""
    return 1.0 if step <= start else 1 - (1 - lowest) * (step - start) / (end - start)


def plateau(val_losses: Sequence[float], patience: int, factor: float, lowest: float) -> float:
    """Multiplied by `factor` after each `patience` validations in a row without improvement;
    at least `lowest`.

    >>> plateau([3.0, 2.0, 2.5, 2.5, 2.5, 2.5, 1.0, 1.5], patience=2, factor=0.5, lowest=0.1)
    0.25
    """
    n_cuts, n_waited = 0, 0
    for improved in improvements(val_losses):
        n_waited = 0 if improved else n_waited + 1
        if n_waited == patience:
            n_cuts, n_waited = n_cuts + 1, 0
    return max(lowest, factor**n_cuts)


def should_stop(val_losses: Sequence[float], patience: int | None) -> bool:
    """Whether the last `patience` validations in a row brought no improvement;
    never if `patience` is None.

    >>> should_stop([3.0, 2.0, 2.1, 2.0], 2), should_stop([3.0, 2.0, 2.1, 1.9], 2)
    (True, False)
    """
    if patience is None or len(val_losses) < patience:
        return False
    return not any(improvements(val_losses)[-patience:])


def improvements(val_losses: Sequence[float]) -> list[bool]:
    """Whether each loss is lower than all before it; NaN and infinity never are.

    >>> improvements([math.nan, 3.0, 3.0, math.nan, 2.0])
    [False, True, False, False, True]
    """
    best = math.inf
    found = []
    for loss in val_losses:
        found.append(loss < best)
        if loss < best:
            best = loss
    return found
