"""The pairwise loss worked by hand and by trl, and its metrics."""

import math

import pytest
import torch

from tinylm.objectives.preferences import Answers
from tinylm.objectives.reward_model import METRICS, pairwise_loss, reward_metrics, score_rewards

REWARDS = Answers(torch.tensor([1.0, -0.5, 2.0]), torch.tensor([0.25, 0.5, -1.0]))


def test_the_loss_is_that_of_a_hand_computation_and_of_trl() -> None:
    """Differences 0.75, -1 and 3: ln(1 + e^-d), mean 0.582907; with a coefficient of 0.1 for the
    squared sums 1.5625, 0 and 1, the mean rises by 0.085417. trl 1.16.0,
    RewardTrainer.compute_loss: 0.5829066634 and 0.6683233380.
    """
    by_hand = [math.log(1 + math.exp(-difference)) for difference in (0.75, -1.0, 3.0)]
    assert pairwise_loss(REWARDS).tolist() == pytest.approx(by_hand, rel=1e-6)
    assert pairwise_loss(REWARDS).mean().item() == pytest.approx(0.5829066634, rel=1e-6)
    assert pairwise_loss(REWARDS, 0.1).mean().item() == pytest.approx(0.6683233380, rel=1e-6)


def test_the_metrics_are_means_over_pairs_without_padding() -> None:
    """Two of three pairs are in the right order; the pair of padding, with any rewards, is not
    counted. The interval is Wilson's for 2 of 3: 0.2077 to 0.9385.
    """
    rewards = torch.cat(
        (REWARDS.chosen, torch.tensor([9.0]), REWARDS.rejected, torch.tensor([7.0]))
    )
    found = score_rewards(rewards, torch.tensor([True, True, True, False]), 0.0)
    assert len(found.loss) == 3
    expected = [2.5, -0.25, 2.75, 2.0]
    assert dict(zip(METRICS, found.metrics.tolist(), strict=True)) == pytest.approx(
        dict(zip(METRICS, expected, strict=True))
    )
    means = reward_metrics([float(found.loss.sum()), 3.0, *found.metrics.tolist()])
    assert means["val_accuracy"] == pytest.approx(2 / 3)
    assert means["val_accuracy_low"] == pytest.approx(0.2077, abs=1e-4)
    assert means["val_accuracy_high"] == pytest.approx(0.9385, abs=1e-4)
    assert means["val_margin"] == pytest.approx(2.75 / 3)


@pytest.mark.slow
@pytest.mark.parametrize("center_coef", [None, 0.1])
def test_loss_and_gradient_are_those_of_trl(center_coef: float | None) -> None:
    """RewardTrainer.compute_loss with a model that returns given rewards."""
    pytest.importorskip("trl")
    from collections import defaultdict
    from types import SimpleNamespace

    from trl import RewardTrainer

    rewards = torch.randn(8, 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    trainer = SimpleNamespace(
        model=torch.nn.Linear(1, 1),
        args=SimpleNamespace(center_rewards_coefficient=center_coef),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {"attention_mask": torch.ones(8, 3)}
    expected = RewardTrainer.compute_loss(
        trainer, lambda **named: SimpleNamespace(logits=rewards), inputs
    )
    (wanted,) = torch.autograd.grad(expected, rewards)
    found = pairwise_loss(Answers(*rewards.squeeze(-1).chunk(2)), center_coef or 0.0).mean()
    (gradient,) = torch.autograd.grad(found, rewards)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, wanted)
