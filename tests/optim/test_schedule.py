"""The learning rate: S4's formulas to the last digit, and the shape of the others."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.config.schema import TrainingConfig
from tinylm.optim.schedule import improvements, multiplier, should_stop

INF, NAN = math.inf, math.nan


def settings(**values: object) -> TrainingConfig:
    """Training settings; validation is every step, so that `plateau` is allowed at any length."""
    return TrainingConfig(**{"val_every_steps": 1, **values})


def s4_learning_rate_cosine(
    t: int,
    max_learning_rate: float,
    min_learning_rate: float,
    warmup_iters: int,
    cosine_cycle_iters: int,
) -> float:
    """The three phases as the seed S4 states them, written down from its text."""
    if t < warmup_iters:
        return t * max_learning_rate / warmup_iters
    if t <= cosine_cycle_iters:
        progress = (t - warmup_iters) / (cosine_cycle_iters - warmup_iters)
        return min_learning_rate + 0.5 * (1 + math.cos(math.pi * progress)) * (
            max_learning_rate - min_learning_rate
        )
    return min_learning_rate


def test_warmup_cosine_is_s4s_example_at_every_step() -> None:
    """S4's own numbers, a tenth as long: 6e-4 to 6e-5, warmup 200 of 10,000, and on past the end."""
    training = settings(max_steps=10_000, warmup_ratio=0.02, min_lr_ratio=0.1, lr=6e-4)
    for t in range(0, 10_100, 7):
        assert training.lr * multiplier(t, training) == pytest.approx(
            s4_learning_rate_cosine(t, 6e-4, 6e-5, 200, 10_000), rel=1e-12, abs=0
        )


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),  # phase 1 starts at 0 / 10
        (1, 0.1),
        (9, 0.9),
        (10, 1.0),  # phase 2 starts: cos 0 = 1
        (40, 0.1 + 0.5 * (1 + 0.5) * 0.9),  # a third of the way: cos 60° = 1/2
        (55, 0.55),  # half way: cos 90° = 0, the mean of 1 and 0.1
        (100, 0.1),  # its end: cos 180° = -1
        (101, 0.1),  # phase 3
        (10**9, 0.1),
    ],
)
def test_warmup_cosine_by_hand(step: int, expected: float) -> None:
    """Warmup 10 of 100 steps, lowest 0.1."""
    training = settings(max_steps=100, warmup_ratio=0.1, min_lr_ratio=0.1)
    assert multiplier(step, training) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (5, 0.5),
        (10, 1.0),
        (50, 1.0),
        (80, 1.0),
        (85, 0.8),
        (90, 0.6),
        (99, 0.24),
        (100, 0.2),
        (101, 0.2),
    ],
)
def test_wsd_by_hand(step: int, expected: float) -> None:
    """Warmup 10, decay over the last 20 of 100 steps from 1 to 0.2: 0.04 a step."""
    training = settings(
        schedule="wsd", max_steps=100, warmup_ratio=0.1, decay_ratio=0.2, min_lr_ratio=0.2
    )
    assert multiplier(step, training) == pytest.approx(expected, abs=1e-15)


def test_wsd_reaches_the_peak_where_rounding_makes_the_phases_overlap() -> None:
    """3 steps, half of them each phase: 1.5 rounds to 2 twice. The warmup keeps its 2, the decay has 1."""
    training = settings(
        schedule="wsd", max_steps=3, warmup_ratio=0.5, decay_ratio=0.5, min_lr_ratio=0.0
    )
    assert [multiplier(step, training) for step in range(5)] == [0.0, 0.5, 1.0, 0.0, 0.0]


@given(step=st.integers(0, 10**9))
def test_constant_is_the_peak_from_the_first_step(step: int) -> None:
    """No warmup, for any warmup_ratio."""
    assert multiplier(step, settings(schedule="constant", warmup_ratio=0.5)) == 1.0


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], 1.0),
        ([3, 2, 1], 1.0),
        ([3, 3], 1.0),  # one without improvement
        ([3, 3, 4], 0.5),  # two: the first cut
        ([3, 3, 4, 3], 0.5),
        ([3, 3, 4, 3, 3], 0.25),  # two more
        ([3, 3, 2, 2], 1.0),  # an improvement between starts the count again
        ([3, 3, 3, 2, 2, 2], 0.25),
        ([3, NAN, NAN], 0.5),  # NaN is no improvement
        ([NAN, NAN, 3], 0.5),  # not as the first loss either, nor does it hide the next one
        ([3] * 20, 0.1),  # 0.5^9 is below the lowest
    ],
)
def test_plateau_cuts_by_the_factor_for_each_patience_without_improvement(
    losses: list[float], expected: float
) -> None:
    """Patience 2, factor 0.5, lowest 0.1; after the warmup the step itself does not matter."""
    training = settings(
        schedule="plateau",
        max_steps=100,
        warmup_ratio=0.1,
        plateau_patience=2,
        plateau_factor=0.5,
        min_lr_ratio=0.1,
    )
    assert [multiplier(step, training, losses) for step in (10, 50, 500)] == [expected] * 3
    assert multiplier(5, training, losses) == 0.5


def test_plateau_counts_as_torchs_reduce_on_plateau_does() -> None:
    """The oracle cuts after more than `patience` bad epochs, so its patience is one less than ours."""
    import torch

    losses = torch.rand(200, generator=torch.Generator().manual_seed(0)).sqrt().tolist()
    training = settings(
        schedule="plateau",
        warmup_ratio=0.0,
        plateau_patience=4,
        plateau_factor=0.9,
        min_lr_ratio=0.05,
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.9, patience=3, threshold=0.0, min_lr=0.05, eps=0.0
    )
    for n, loss in enumerate(losses, 1):
        oracle.step(loss)
        assert multiplier(n, training, losses[:n]) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-12
        )


schedules = st.builds(
    settings,
    schedule=st.sampled_from(["warmup_cosine", "wsd", "constant", "plateau"]),
    max_steps=st.integers(1, 500),
    warmup_ratio=st.floats(0, 0.5),
    decay_ratio=st.floats(0.01, 0.5),
    min_lr_ratio=st.floats(0, 1),
)
histories = st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30)


@given(training=schedules, step=st.integers(0, 1000), losses=histories)
def test_multiplier_is_a_share(training: TrainingConfig, step: int, losses: list[float]) -> None:
    """Between 0 and 1 for any settings and history, and not below min_lr_ratio after the warmup."""
    share = multiplier(step, training, losses)
    assert 0 <= share <= 1
    if step >= training.warmup_ratio * training.max_steps + 1:
        assert share >= training.min_lr_ratio - 1e-15


@given(training=schedules)
def test_no_step_jumps_further_than_its_phases_slope(training: TrainingConfig) -> None:
    """Continuity, also at the phases' borders.

    The warmup climbs 1 / its steps; half a cosine is nowhere steeper than π/2 times the straight line; a phase of n
    steps is at least ratio * max_steps - 1/2 of them long, by rounding.
    """
    if training.schedule in ("constant", "plateau"):
        return
    warmup = round(training.warmup_ratio * training.max_steps)
    decay = training.max_steps - warmup
    if training.schedule == "wsd":
        decay = min(decay, round(training.decay_ratio * training.max_steps))
    steepest = max(1 / warmup if warmup else 0, math.pi / 2 / decay if decay else 1)
    shares = [multiplier(step, training) for step in range(training.max_steps + 2)]
    assert all(abs(b - a) <= steepest + 1e-12 for a, b in zip(shares, shares[1:], strict=False))


@given(training=schedules)
def test_rises_in_the_warmup_and_never_after_it(training: TrainingConfig) -> None:
    """One peak, at the end of the warmup, if the run is longer than that."""
    warmup = (
        0 if training.schedule == "constant" else round(training.warmup_ratio * training.max_steps)
    )
    shares = [multiplier(step, training) for step in range(training.max_steps + 2)]
    rise, fall = shares[: warmup + 1], shares[warmup:]
    if warmup < training.max_steps:
        assert fall[0] == 1
        assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)


@given(losses=histories, later=histories, step=st.integers(0, 600))
def test_plateau_never_rises_again(losses: list[float], later: list[float], step: int) -> None:
    """More validations can only cut further."""
    training = settings(schedule="plateau", min_lr_ratio=0.01)
    assert multiplier(step, training, losses + later) <= multiplier(step, training, losses)


@pytest.mark.parametrize(
    ("losses", "stop"),
    [
        ([], False),
        ([1, 1], False),
        ([1, 1, 1], True),  # equal is not better
        ([1, 2, 0.5], False),
        ([3, 2, 1.9, 2, 1.8], False),
        ([3, 2, 2.5, 2.1], True),  # 2.1 is better than 2.5, not than the best
        ([1, NAN, NAN], True),
        ([NAN, NAN], True),
        ([INF, INF], True),  # a loss that overflowed improves on nothing
        ([NAN, 1.0], False),
    ],
)
def test_stops_after_patience_validations_in_a_row_without_improvement(
    losses: list[float], stop: bool
) -> None:
    """Patience 2."""
    assert should_stop(losses, 2) is stop


@given(losses=histories)
def test_never_stops_without_patience_or_after_an_improvement(losses: list[float]) -> None:
    """None is: never; and a finite best of all is an improvement at any patience."""
    assert not should_stop(losses, None)
    best_of_all = min((loss for loss in losses if loss == loss), default=0.0) - 1
    if best_of_all > -1e15:
        assert not should_stop([*losses, min(best_of_all, 0.0)], 1)


@given(losses=st.lists(st.floats(-10, 10), max_size=30))
def test_improvements_are_the_strict_running_minima(losses: list[float]) -> None:
    """The definition, in quadratic time."""
    assert improvements(losses) == [
        all(loss < before for before in losses[:i]) for i, loss in enumerate(losses)
    ]
