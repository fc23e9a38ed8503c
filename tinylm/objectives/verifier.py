# B pairs · T tokens of one · D model width

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm.common.statistics import wilson
from tinylm.model.verifier import LOGIT_LIMIT, LOGIT_STEP

CALIBRATION_BINS = 10


def verifier_loss(places: Tensor, right: Tensor, departs: Tensor) -> Tensor:
    """The sum over pairs of the cross entropy of which token is wrong, or none.

    With the odds o_t of each token, and 1 of none, a right answer costs -log(1 / (1 + sum of o_t)), a wrong one minus the log of
    what the tokens have, in which it departs from the right one. Where those are all, that is the cross entropy of right and wrong.

    Args:
        places: (B, T) log-odds, as `Verifier.places` gives them.
        right: (B,) whether the answer is right.
        departs: (B, T) the tokens among which a wrong answer's wrong one is; nothing for a right one.
    """
    none = F.softplus(places.logsumexp(dim=1))  # -log of the probability that no token is wrong
    wrong = places.masked_fill(~departs | right.bool()[:, None], -math.inf)
    # A right answer has no such token: 0 in its place, or the gradient of what is not taken would be no number.
    taken = torch.where(right.bool()[:, None], torch.zeros_like(wrong), wrong).logsumexp(dim=1)
    return (none - torch.where(right.bool(), torch.zeros_like(taken), taken)).sum()


def logit_counts(logits: Tensor, right: Tensor) -> Tensor:
    """How many wrong and how many right pairs have a logit in each bin, flat (2 · bins,); a logit beyond the limit is in the last bin."""
    n_bins = round(2 * LOGIT_LIMIT / LOGIT_STEP)
    bins = ((logits / LOGIT_STEP).floor() + n_bins // 2).clamp(0, n_bins - 1).long()
    return torch.bincount(bins + n_bins * right.long(), minlength=2 * n_bins).float()


@dataclass(frozen=True)
class VerifierScore:
    """How a verifier does on held-out pairs."""

    n: int
    accuracy: float
    """share of pairs on the right side of one half"""
    majority: float
    """accuracy of always saying what is more frequent"""
    auc: float
    """probability that a right answer has a higher score than a wrong one; one half is chance"""
    calibration_error: float
    """mean distance between probability and share of right answers, over ten bins (Guo et al. 2017)"""

    @classmethod
    def of(cls, probabilities: np.ndarray, right: np.ndarray) -> "VerifierScore":
        """From the probabilities (N,) of being right and whether they were (N,) bool."""
        right = right.astype(bool)
        accuracy, majority = (
            float(((probabilities >= 0.5) == right).mean()),
            float(max(right.mean(), 1 - right.mean())),
        )
        return cls(
            len(right),
            accuracy,
            majority,
            area_under_curve(probabilities, right),
            calibration_error(probabilities, right),
        )

    @classmethod
    def of_counts(cls, counts: np.ndarray) -> "VerifierScore":
        """From a sum of `logit_counts`: each pair counts as one in the middle of its bin."""
        counts = counts.reshape(2, -1).astype(int)
        middles = (np.arange(counts.shape[1]) + 0.5) * LOGIT_STEP - LOGIT_LIMIT
        probabilities = 1 / (1 + np.exp(-middles))
        return cls.of(
            np.concatenate([np.repeat(probabilities, row) for row in counts]),
            np.repeat([False, True], counts.sum(axis=1)),
        )

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the accuracy."""
        return wilson(self.accuracy, self.n)


def area_under_curve(scores: np.ndarray, right: np.ndarray) -> float:
    """The share of (right, wrong) pairs in which the right one has the higher score, ties counted half; NaN without both.

    >>> area_under_curve(np.array([0.9, 0.4, 0.4, 0.1]), np.array([True, True, False, False]))
    0.875
    """
    n_right, n_wrong = int(right.sum()), int((~right).sum())
    if not n_right or not n_wrong:
        return float("nan")
    values, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[
        inverse
    ]  # equal scores share the mean of their ranks
    return float((ranks[right].sum() - n_right * (n_right + 1) / 2) / (n_right * n_wrong))


def calibration_error(probabilities: np.ndarray, right: np.ndarray) -> float:
    """The mean over all pairs of |probability - share of right answers| of their bin; 0 is perfect."""
    bins = np.minimum((probabilities * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    total = sum(
        abs(probabilities[bins == b].sum() - right[bins == b].sum())
        for b in range(CALIBRATION_BINS)
    )
    return float(total / len(right))
