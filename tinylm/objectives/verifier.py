"""The loss of a verifier, and how well its scores separate right from wrong answers.

In reading order: `verifier_loss`; `logit_counts`, a histogram of logits; `verifier_sums` of a batch,
added over batches and ranks, and `verifier_metrics` of the total; `VerifierScore`, computed from a
histogram or from probabilities; the area under the curve and the calibration error.
"""


# B (problem, answer) pairs · T tokens of one pair · N held-out pairs

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm.common.statistics import wilson

# The histogram of logits: bins of this width up to this distance from 0, so that 0 is a border
# between two bins. Within a bin a probability changes by at most 0.0025 (the sigmoid's slope is at
# most 1/4, and half a bin is 0.01).
LOGIT_STEP = 0.02
LOGIT_LIMIT = 20
CALIBRATION_BINS = 10


def verifier_loss(error_logits: Tensor, right: Tensor, error_mask: Tensor) -> Tensor:
    """The sum over pairs of the cross entropy of "which token is the error, or none".

    With the odds o_t of each token, and odds 1 for no error, T + 1 outcomes have the probabilities

        p(no error) = 1 / (1 + Σ o_t)            p(error at t) = o_t / (1 + Σ o_t)

    A right answer costs -log p(no error). A wrong answer costs -log of the probability of
    `error_mask`, the tokens among which its error is: the sum of their p. If those are all tokens,
    this is the binary cross entropy of right and wrong.

    Args:
        error_logits: (B, T) log o_t, from `Verifier.error_logits`.
        right: (B,) whether the answer is right.
        error_mask: (B, T) the tokens where a wrong answer differs from a right one; ignored for a
            right answer.
    """
    right = right.bool()
    # log(1 + Σ o_t), the log of the denominator of all outcomes
    log_total = F.softplus(error_logits.logsumexp(dim=1))  # (B,)
    # log Σ o_t over the error tokens. A right answer has none: 0 in its place, since the gradient
    # of a logsumexp of nothing but -inf is NaN, and NaN times 0 is NaN too.
    candidates = error_logits.masked_fill(~error_mask | right[:, None], -math.inf)  # (B, T)
    log_error = torch.where(right[:, None], torch.zeros_like(candidates), candidates).logsumexp(1)
    # -log p(outcome) = log total - log odds of the outcome; the odds of no error are 1, their log
    # is 0
    return (log_total - torch.where(right, torch.zeros_like(log_error), log_error)).sum()


def logit_counts(logits: Tensor, right: Tensor) -> Tensor:
    """How many wrong, then how many right pairs have a logit in each bin: (2 · bins,).

    Logits beyond the limit are in the outermost bins.
    """
    n_bins = round(2 * LOGIT_LIMIT / LOGIT_STEP)
    bins = ((logits / LOGIT_STEP).floor() + n_bins // 2).clamp(0, n_bins - 1).long()  # (B,)
    return torch.bincount(bins + n_bins * right.long(), minlength=2 * n_bins).float()


def verifier_sums(error_logits: Tensor, right: Tensor, error_mask: Tensor) -> Tensor:
    """`verifier_loss`, then `logit_counts`: (1 + 2 · bins,), to be added over batches and ranks.

    Args: as `verifier_loss`.
    """
    loss = verifier_loss(error_logits, right, error_mask)
    return torch.cat((loss[None], logit_counts(-error_logits.logsumexp(dim=1), right)))


def verifier_metrics(totals: Sequence[float]) -> dict[str, float]:
    """The mean loss and the numbers of `VerifierScore`, from a sum of `verifier_sums`."""
    loss, *counts = totals
    score = VerifierScore.of_counts(np.array(counts))
    return {
        "val_loss": loss / score.n,
        "val_accuracy": score.accuracy,
        "val_accuracy_low": score.interval[0],
        "val_accuracy_high": score.interval[1],
        "val_majority": score.majority,
        "val_auc": score.auc,
        "val_calibration_error": score.calibration_error,
    }


@dataclass(frozen=True)
class VerifierScore:
    """How well a verifier does on held-out pairs."""

    n: int
    accuracy: float
    """share of pairs on the correct side of probability 1/2"""
    majority: float
    """accuracy of always predicting the more frequent answer"""
    auc: float
    """probability that a right answer scores higher than a wrong one; 1/2 is chance"""
    calibration_error: float
    """mean distance between probability and share of right answers, over ten bins
    (Guo et al. 2017)"""

    @classmethod
    def of(cls, probabilities: np.ndarray, right: np.ndarray) -> "VerifierScore":
        """From the probabilities (N,) of being right, and whether each pair is right (N,)."""
        right = right.astype(bool)
        share = right.mean()
        return cls(
            n=len(right),
            accuracy=float(((probabilities >= 0.5) == right).mean()),
            majority=float(max(share, 1 - share)),
            auc=area_under_curve(probabilities, right),
            calibration_error=calibration_error(probabilities, right),
        )

    @classmethod
    def of_counts(cls, counts: np.ndarray) -> "VerifierScore":
        """From a sum of `logit_counts`: each pair counts as one in the middle of its bin."""
        counts = counts.reshape(2, -1).astype(int)  # (2, bins): wrong, right
        centers = (np.arange(counts.shape[1]) + 0.5) * LOGIT_STEP - LOGIT_LIMIT
        probabilities = 1 / (1 + np.exp(-centers))
        repeated = np.concatenate([np.repeat(probabilities, row) for row in counts])
        return cls.of(repeated, np.repeat([False, True], counts.sum(axis=1)))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the accuracy."""
        return wilson(self.accuracy, self.n)


def area_under_curve(scores: np.ndarray, right: np.ndarray) -> float:
    """The share of (right, wrong) pairs in which the right one scores higher, ties counted half;
    NaN without both.

    Computed from ranks (Mann and Whitney 1947): U = (sum of the ranks of the right) - n (n + 1) /
    2.

    >>> area_under_curve(np.array([0.9, 0.4, 0.4, 0.1]), np.array([True, True, False, False]))
    0.875
    """
    n_right, n_wrong = int(right.sum()), int((~right).sum())
    if not n_right or not n_wrong:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    # Equal scores share the mean of their ranks.
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    u = ranks[right].sum() - n_right * (n_right + 1) / 2
    return float(u / (n_right * n_wrong))


def calibration_error(probabilities: np.ndarray, right: np.ndarray) -> float:
    """The mean over all pairs of |mean probability - share of right answers| of the pair's bin;
    0 is perfect.
    """
    bins = (probabilities * CALIBRATION_BINS).astype(int)
    bins = np.minimum(bins, CALIBRATION_BINS - 1)
    total = 0.0
    for b in range(CALIBRATION_BINS):
        total += abs(probabilities[bins == b].sum() - right[bins == b].sum())
    return float(total / len(right))
