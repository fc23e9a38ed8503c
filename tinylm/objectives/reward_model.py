"""The loss of a reward model on pairs of answers, and how often it prefers the better one.

In reading order: `pairwise_loss`; `RewardLoss`, what one batch contributes; `reward_metrics`, the
means over all pairs of a validation, with the interval of the accuracy.
"""

# B pairs · n pairs that are not padding

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm.common.statistics import wilson
from tinylm.objectives.preferences import Answers

# Columns of metrics.csv, means over pairs.
METRICS = ("rewards_chosen", "rewards_rejected", "margin", "accuracy")
VAL_METRICS = (
    *(f"val_{name}" for name in METRICS),
    "val_accuracy_low",
    "val_accuracy_high",
)


def pairwise_loss(rewards: Answers, center_coef: float = 0.0) -> Tensor:
    """The loss (B,) of each pair, from the rewards of its answers.

        -log σ(r_chosen - r_rejected) + center_coef · (r_chosen + r_rejected)²

    The first term is the negative log-likelihood of the preference if an answer of reward r wins
    with odds e^r (Bradley and Terry 1952; Ouyang et al. 2022, equation 1). It only sees the
    difference; the second term (Eisenstein et al. 2023) keeps the sum near 0.
    """
    center = (rewards.chosen + rewards.rejected).square()  # (B,)
    return -F.logsigmoid(rewards.chosen - rewards.rejected) + center_coef * center


class RewardLoss(NamedTuple):
    """A batch of pairs under a reward model."""

    loss: Tensor
    """(n,)"""
    metrics: Tensor
    """(len(METRICS),) sums over the pairs"""


def score_rewards(rewards: Tensor, real: Tensor, center_coef: float) -> RewardLoss:
    """The loss of each pair, and the sums of METRICS.

    Args:
        rewards: (2B,) of the chosen, then of the rejected answers.
        real: (B,) whether a pair is not padding.
        center_coef: as `pairwise_loss` takes it.
    """
    chosen, rejected = (part[real] for part in rewards.chunk(2))  # (n,) each
    loss = pairwise_loss(Answers(chosen, rejected), center_coef)
    columns = (chosen, rejected, chosen - rejected, chosen > rejected)  # as in METRICS
    sums = [column.detach().float().sum() for column in columns]
    return RewardLoss(loss, torch.stack(sums))


def reward_metrics(totals: Sequence[float]) -> dict[str, float]:
    """val_loss and VAL_METRICS, from the sum of the losses, the number of pairs and the sums of
    METRICS.
    """
    loss, n_pairs, *sums = totals
    means = [total / n_pairs for total in sums]
    low, high = wilson(means[-1], round(n_pairs))
    return {"val_loss": loss / n_pairs} | dict(zip(VAL_METRICS, (*means, low, high), strict=True))
