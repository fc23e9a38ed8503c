"""The learning rate over the steps, as pure functions: the same step always gives the same number.

`multiplier` says which share of its peak the learning rate has at a step; `should_stop` says when validation has
stopped improving. Both are worked out from the step and the whole history of validation losses, so a resumed run has
nothing to restore. Knows nothing of optimizers: `tinylm.optim.optimizers.set_lr` applies the number.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, groupby

from tinylm.config.schema import TrainingConfig


def multiplier(step: int, training: TrainingConfig, val_losses: Sequence[float] = ()) -> float:
    """The share of its peak, in [0, 1], that the learning rate has at `step`, counted from 0.

    Every schedule but `constant` rises linearly from 0 at step 0 to 1 at step round(warmup_ratio * max_steps); what
    follows is the function of the schedule's name below. Only `plateau` reads `val_losses`, all so far, oldest first.

    >>> settings = TrainingConfig(max_steps=100, warmup_ratio=0.1, min_lr_ratio=0.1)
    >>> [round(multiplier(step, settings), 3) for step in (0, 5, 10, 55, 100, 1000)]
    [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]
    """
    if training.schedule == "constant":
        return 1.0
    warmup_steps = round(training.warmup_ratio * training.max_steps)
    if step < warmup_steps:
        return step / warmup_steps
    if training.schedule == "plateau":
        return plateau(
            val_losses, training.plateau_patience, training.plateau_factor, training.min_lr_ratio
        )
    if step >= training.max_steps:
        return training.min_lr_ratio
    if training.schedule == "wsd":
        decay_steps = round(training.decay_ratio * training.max_steps)
        # Rounding both shares may make them overlap by a step.
        return linear(
            step,
            max(warmup_steps, training.max_steps - decay_steps),
            training.max_steps,
            training.min_lr_ratio,
        )
    return cosine(step, warmup_steps, training.max_steps, training.min_lr_ratio)


def cosine(step: int, start: int, end: int, lowest: float) -> float:
    """From 1 at `start` to `lowest` at `end` along half a cosine (Loshchilov and Hutter 2017, equation 5)."""
    progress = (step - start) / (end - start)
    return lowest + 0.5 * (1 + math.cos(math.pi * progress)) * (1 - lowest)


def linear(step: int, start: int, end: int, lowest: float) -> float:
    """1 until `start`, then in a straight line to `lowest` at `end` (the decay of Hu et al. 2024's WSD)."""
    return 1.0 if step <= start else 1 - (1 - lowest) * (step - start) / (end - start)


def plateau(val_losses: Sequence[float], patience: int, factor: float, lowest: float) -> float:
    """`factor` for each time that `patience` validations in a row brought no improvement, but never below `lowest`.

    >>> plateau([3.0, 2.0, 2.5, 2.5, 2.5, 2.5, 1.0, 1.5], patience=2, factor=0.5, lowest=0.1)
    0.25
    """
    runs = (len(list(run)) for improved, run in groupby(improvements(val_losses)) if not improved)
    return max(lowest, factor ** sum(run // patience for run in runs))


def should_stop(val_losses: Sequence[float], patience: int | None) -> bool:
    """Whether the last `patience` validations in a row brought no improvement; never where `patience` is None.

    >>> should_stop([3.0, 2.0, 2.1, 2.0], 2), should_stop([3.0, 2.0, 2.1, 1.9], 2)
    (True, False)
    """
    return (
        patience is not None
        and len(val_losses) >= patience
        and not any(improvements(val_losses)[-patience:])
    )


def improvements(val_losses: Sequence[float]) -> list[bool]:
    """Whether each loss is lower than all before it; NaN and infinity never are.

    >>> improvements([math.nan, 3.0, 3.0, math.nan, 2.0])
    [False, True, False, False, True]
    """
    best_before = accumulate(
        val_losses, lambda best, loss: loss if loss < best else best, initial=math.inf
    )
    return [loss < best for loss, best in zip(val_losses, best_before, strict=False)]
