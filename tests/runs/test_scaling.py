"""The power law of the ladder, on losses whose law is known."""

import numpy as np
import pytest

from tinylm.runs.scaling import fit_power_law

COMPUTE = np.array([1e10, 1e11, 1e12, 1e13])


def law(compute, floor=1.5, scale=2.0, exponent=0.25):
    return floor + scale * (compute / 1e10) ** -exponent


def test_losses_on_a_law_give_its_parameters():
    """0.25 is on the grid of exponents; there is no interval, as nothing is left over."""
    fit = fit_power_law(COMPUTE, law(COMPUTE))
    measures = fit.intervals()
    expected = {"floor": 1.5, "scale": 2.0, "exponent": 0.25}
    for name, value in expected.items():
        measure = measures[name]
        assert [measure.value, measure.low, measure.high] == pytest.approx([value] * 3, abs=1e-6)
    assert fit.predict(1e14).value == pytest.approx(law(1e14), abs=1e-6)


def test_a_floor_is_never_negative():
    """Losses that fall faster than a power law to 0 would have one below 0."""
    fit = fit_power_law(COMPUTE, np.array([4.0, 3.0, 1.9, 0.5]))
    assert fit.law.floor == 0
    assert (fit.resampled.floor >= 0).all()


@pytest.mark.slow
def test_the_interval_of_a_prediction_holds_about_95_in_100_new_runs():
    """Two seeds a size, noise of 0.01. Of 20 ladders 19 are expected to have the next run in its
    interval; 15 or fewer would have a chance of 1 in 400.
    """
    draw = np.random.default_rng(5)
    compute = np.repeat(COMPUTE, 2)
    held = 0
    for _ in range(20):
        fit = fit_power_law(compute, law(compute) + 0.01 * draw.standard_normal(8), n_resamples=100)
        predicted = fit.predict(1e14)
        held += predicted.low <= law(1e14) + 0.01 * draw.standard_normal() <= predicted.high
    assert held >= 16


@pytest.mark.parametrize("n", [3, 0])
def test_too_few_runs_are_a_mistake_of_the_caller(n):
    compute = np.array([1.0, 2.0, 3.0])[:n] if n else np.array([1.0, 1.0, 2.0, 2.0])
    with pytest.raises(ValueError, match="three different values"):
        fit_power_law(compute, np.ones(len(compute)))
