"""The advantages of groups, and the loss of GRPO, DAPO and Dr. GRPO, against their formulas by hand
and against autograd.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinylm.config.finetuning import GrpoConfig
from tinylm.objectives.grpo import (
    group_advantages,
    has_spread,
    loss_of_answers,
    mean_over_tokens,
    policy_loss,
    score_tokens,
)
from tinylm.tokens.packing import IGNORE_INDEX

# Log-probabilities of two answers of three and two tokens, now and when they were written.
NOW = torch.tensor([[-0.5, -1.0, -2.0], [-0.1, -0.7, 0.0]], dtype=torch.float64)
OLD = torch.tensor([[-0.5, -1.5, -1.0], [-0.3, -0.7, 0.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-0.6, -1.2, -1.9], [-0.1, -0.2, 0.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])
ADVANTAGES = torch.tensor([2.0, -1.0], dtype=torch.float64)


def by_hand(low: float, high: float, kl: float) -> list[list[float]]:
    """The loss of each token, with Python's floats, as Shao et al. 2024 write it (equations 3, 4)."""
    losses = []
    for i, advantage in enumerate(ADVANTAGES.tolist()):
        losses.append([])
        for t in range(3):
            ratio = math.exp(float(NOW[i, t]) - float(OLD[i, t]))
            kept = min(max(ratio, 1 - low), 1 + high)
            reference = math.exp(float(REFERENCE[i, t]) - float(NOW[i, t]))
            k3 = reference - math.log(reference) - 1
            losses[-1].append(-(min(ratio * advantage, kept * advantage) - kl * k3))
    return losses


@pytest.mark.parametrize(("low", "high", "kl"), [(0.2, 0.2, 0.0), (0.2, 0.28, 0.04), (0.1, 5.0, 1)])
def test_the_loss_of_a_token_is_the_formula_of_the_paper(
    low: float, high: float, kl: float
) -> None:
    """Ratios inside the band, above and below it, with both signs of the advantage."""
    grpo = GrpoConfig(clip_low=low, clip_high=high, kl=kl)
    found = policy_loss(NOW, OLD, ADVANTAGES, REFERENCE, grpo)
    assert found.loss.tolist() == [pytest.approx(row, rel=1e-12) for row in by_hand(low, high, kl)]


def test_the_three_losses_weigh_tokens_as_their_papers_say() -> None:
    """Two answers of 3 and 2 tokens, max_new_tokens 4: the sums of the papers, written out."""
    token = torch.tensor([[1.0, 2.0, 6.0], [5.0, 7.0, 99.0]])

    def step(loss: str) -> float:
        grpo = GrpoConfig(loss=loss, max_new_tokens=4)
        return float(loss_of_answers(token, MASK, grpo, tokens_per_answer=5 / 2).mean())

    assert step("grpo") == pytest.approx(((1 + 2 + 6) / 3 + (5 + 7) / 2) / 2)
    assert step("dapo") == pytest.approx((1 + 2 + 6 + 5 + 7) / 5)
    assert step("dr_grpo") == pytest.approx(((1 + 2 + 6) / 4 + (5 + 7) / 4) / 2)


def test_a_token_outside_the_band_has_no_gradient_only_where_its_advantage_pushes() -> None:
    """d/d log p of -min(w A, clip(w) A): -w A inside, and 0 for w > 1.2 with A > 0 or w < 0.8 with
    A < 0; never for the other two sides.
    """
    old = torch.zeros(2, 3)
    now = torch.tensor([[0.0, 1.0, -1.0], [0.0, 1.0, -1.0]], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0])
    found = policy_loss(now, old, advantages, None, GrpoConfig())
    found.loss.sum().backward()
    w = now.detach().exp()
    expected = torch.stack((-w[0] * torch.tensor([1, 0, 1]), w[1] * torch.tensor([1, 1, 0])))
    assert torch.allclose(now.grad, expected)
    assert found.clipped.tolist() == [[False, True, False], [False, False, True]]


def test_at_the_first_step_the_gradient_is_that_of_reinforce() -> None:
    """The ratio is 1, so the gradient of a token is -A times that of log p (Williams 1992)."""
    now = NOW.clone().requires_grad_()
    policy_loss(now, NOW, ADVANTAGES, None, GrpoConfig()).loss.sum().backward()
    assert torch.allclose(now.grad, -ADVANTAGES[:, None].expand(2, 3))


def test_log_probabilities_and_entropy_are_those_of_the_tempered_softmax() -> None:
    """Against torch's log_softmax of logits / temperature, values and gradients, with a soft cap."""
    torch.manual_seed(0)
    hidden = torch.randn(2, 4, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    labels = torch.tensor([[1, 2, IGNORE_INDEX, 3], [IGNORE_INDEX, 10, 0, IGNORE_INDEX]])
    for softcap in (None, 3.0):
        logits = hidden @ weight.T
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        log_p = (logits / 0.7).log_softmax(-1)
        target = labels != IGNORE_INDEX
        wanted = log_p.gather(2, labels.clamp(min=0)[..., None]).squeeze(2) * target
        entropy = torch.distributions.Categorical(logits=logits / 0.7).entropy() * target
        found = score_tokens(hidden, weight, labels, temperature=0.7, softcap=softcap)
        assert torch.allclose(found.log_probs, wanted, atol=1e-6)
        assert torch.allclose(found.entropy, entropy.detach(), atol=1e-5)
        grads = torch.autograd.grad(found.log_probs.square().sum(), (hidden, weight))
        expected = torch.autograd.grad(wanted.square().sum(), (hidden, weight))
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(grads, expected, strict=True))


REWARD = st.floats(-100, 100, allow_nan=False, width=32)


@pytest.mark.slow
@given(st.lists(st.lists(REWARD, min_size=4, max_size=4), min_size=1, max_size=5), st.booleans())
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order(
    rewards: list[list[float]], normalize_std: bool
) -> None:
    """A mean is subtracted and a positive number divides."""
    tensor = torch.tensor(rewards, dtype=torch.float64)
    advantages = group_advantages(tensor, normalize_std=normalize_std)
    assert torch.allclose(advantages.sum(dim=1), torch.zeros(len(rewards)).double(), atol=1e-6)
    for own, group in zip(advantages.tolist(), rewards, strict=True):
        order = sorted(range(4), key=lambda i: group[i])
        ranked = [own[i] for i in order]
        assert all(a <= b + 1e-9 for a, b in zip(ranked, ranked[1:], strict=False))


@given(REWARD, st.integers(2, 9), st.booleans())
def test_a_group_without_spread_has_exactly_no_advantage(
    reward: float, size: int, normalize_std: bool
) -> None:
    """Also where the mean of equal numbers is rounded, as of three times 0.1."""
    for value in (reward, 0.1):
        rewards = torch.full((1, size), value, dtype=torch.float64)
        assert group_advantages(rewards, normalize_std=normalize_std).tolist() == [[0.0] * size]
        assert has_spread(rewards).tolist() == [False]


@pytest.mark.slow
@given(st.lists(REWARD, min_size=4, max_size=4), st.floats(0.1, 10), REWARD)
def test_normalized_advantages_do_not_depend_on_the_unit_of_the_reward(
    rewards: list[float], scale: float, shift: float
) -> None:
    """(a r + b) gives the advantages of r, up to the constant that is added to the deviation."""
    group = torch.tensor([rewards], dtype=torch.float64)
    if float(group.std()) < 1:
        return
    moved = group_advantages(group * scale + shift, normalize_std=True)
    assert torch.allclose(moved, group_advantages(group, normalize_std=True), atol=5e-3)


def test_an_answer_without_a_trained_token_has_a_mean_of_zero() -> None:
    """As one that is masked because it was truncated."""
    mask = torch.tensor([[False, False]])
    assert mean_over_tokens(torch.tensor([[3.0, 4.0]]), mask).tolist() == [0.0]
