"""A power law for loss against compute, with intervals.

    L(C) = E + A · (C / C₀)⁻ᵇ          E the loss that no compute removes, C₀ the smallest compute

Kaplan et al. 2020, equation 1.1, with the constant of Henighan et al. 2020 and Hoffmann et al. 2022.
For a given b the best E and A are those of linear least squares, so only b is searched, on a grid.

The intervals are a parametric bootstrap: the fitted law with new noise is fitted again. The noise is
what the runs differ from the law by, whether by chance (seeds) or because the law is not exact. Knows
nothing of runs or files.
"""

# n runs · R resamples · b exponent

from dataclasses import dataclass

import numpy as np

from tinylm.common.statistics import Measure, middle_95

EXPONENTS = np.arange(0.01, 2.0, 0.005)
N_PARAMETERS = 3
N_RESAMPLES = 2000


@dataclass(frozen=True)
class PowerLaw:
    """The parameters of one fit, or (R,) of each."""

    floor: np.ndarray
    """E"""
    scale: np.ndarray
    """A, the loss above E at the smallest compute"""
    exponent: np.ndarray
    """b"""
    smallest: float
    """C₀"""

    def loss(self, compute: float | np.ndarray) -> np.ndarray:
        """L(compute), for one law and any compute, or for all laws and one compute."""
        return self.floor + self.scale * (compute / self.smallest) ** -self.exponent


@dataclass(frozen=True)
class Fit:
    """A law, and the laws that resampled losses give."""

    law: PowerLaw
    resampled: PowerLaw
    sigma: float
    """standard deviation of a run about the law"""
    freedom: int
    """degrees of freedom of sigma: runs less what was fitted to them"""

    def intervals(self) -> dict[str, Measure]:
        """E, A and b with their 95% intervals."""
        measures = {}
        for name in ("floor", "scale", "exponent"):
            low, high = middle_95(getattr(self.resampled, name))
            measures[name] = Measure(float(getattr(self.law, name)), low, high)
        return measures

    def predict(self, compute: float) -> Measure:
        """The loss of a new run with this compute: the interval has the run's own noise too."""
        draw = np.random.default_rng(1)
        losses = self.resampled.loss(compute)
        losses = losses + _noise(draw, len(losses), 1, self.sigma, self.freedom)[:, 0]
        return Measure(float(self.law.loss(compute)), *middle_95(losses))


def fit_power_law(
    compute: np.ndarray,
    losses: np.ndarray,
    *,
    n_offsets: int = 0,
    n_resamples: int = N_RESAMPLES,
) -> Fit:
    """The law with the least squares of the residuals.

    Args:
        compute: (n,) of each run, of at least three different values.
        losses: (n,), at least four, so that they can differ from a law of three parameters.
        n_offsets: numbers that were fitted to the losses before, such as the offset of a seed.
        n_resamples: for the intervals.

    Raises:
        ValueError: there are fewer.
    """
    n = len(losses)
    freedom = n - N_PARAMETERS - n_offsets
    if freedom < 1 or len(set(compute.tolist())) < N_PARAMETERS:
        raise ValueError("a power law needs four runs with three different values of compute")
    law = _least_squares(compute, losses[:, None])
    fitted = law.loss(compute)  # (n,)
    sigma = float(np.sqrt(((losses - fitted) ** 2).sum() / freedom))
    noise = _noise(np.random.default_rng(0), n_resamples, n, sigma, freedom)  # (R, n)
    resampled = _least_squares(compute, (fitted + noise).T)
    one = PowerLaw(law.floor[0], law.scale[0], law.exponent[0], law.smallest)
    return Fit(one, resampled, sigma, freedom)


def _noise(
    draw: np.random.Generator, n_resamples: int, n: int, sigma: float, freedom: int
) -> np.ndarray:
    """Normal noise (R, n). Sigma is itself only known from a few residuals: each resample has one
    from its distribution, as in Student's t.
    """
    sigmas = sigma * np.sqrt(freedom / draw.chisquare(freedom, size=(n_resamples, 1)))
    return sigmas * draw.standard_normal((n_resamples, n))


def _least_squares(compute: np.ndarray, losses: np.ndarray) -> PowerLaw:
    """The laws of each column of `losses` (n, R)."""
    smallest = float(compute.min())
    best = np.full(losses.shape[1], np.inf)  # (R,): squares of the best law so far
    floor, scale, exponent = np.zeros_like(best), np.zeros_like(best), np.zeros_like(best)
    mean = losses.mean(axis=0)  # (R,)
    for b in EXPONENTS:
        x = (compute / smallest) ** -b  # (n,)
        centered = x - x.mean()
        # 1. slope A and intercept E of a line through (x, L)
        slope = centered @ losses / (centered @ centered)  # (R,)
        constant = mean - slope * x.mean()
        # 2. a negative E has no meaning: the best line through 0
        slope = np.where(constant < 0, x @ losses / (x @ x), slope)
        constant = np.maximum(constant, 0)
        # 3. kept where it is better
        squares = ((losses - constant - np.outer(x, slope)) ** 2).sum(axis=0)
        better = squares < best
        best = np.where(better, squares, best)
        floor = np.where(better, constant, floor)
        scale = np.where(better, slope, scale)
        exponent = np.where(better, b, exponent)
    return PowerLaw(floor, scale, exponent, smallest)
