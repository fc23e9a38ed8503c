"""Reinforcement learning from groups of answers: GRPO and two of its variants.

    rewards of a group ─▶ `group_advantages`: how much better than the group's mean each answer is
    answers ─▶ `score_tokens`: log p of each token under the policy
            ─▶ `policy_loss`: clipped objective and divergence of each token
            ─▶ `mean_over_tokens`: one loss for each answer

In place of a learned value function, the mean reward of the other answers to the same prompt says
what reward to expect (Shao et al. 2024, "DeepSeekMath", section 4.1). An answer above the mean is
made more probable, one below it less; a group whose answers all have the same reward teaches
nothing.

How answers are sampled and scored is in training/stages/grpo.py and tinylm/rewards.
"""


# N answers · G answers of a group · T tokens of one · D model width · V vocabulary
# M tokens of a chunk

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tinylm.config.finetuning import GrpoConfig
from tinylm.objectives.cross_entropy import head_dtypes, head_logits, target_chunks

# Added to the standard deviation, which a group of nearly equal rewards would else divide by.
STD_EPS = 1e-4


# --- rewards to advantages ------------------------------------------------------------------------


def group_advantages(rewards: Tensor, *, normalize_std: bool) -> Tensor:
    """The advantage of each answer (groups, G): its reward minus the mean of its group, and divided
    by the group's standard deviation if `normalize_std`; exactly 0 in a group of equal rewards.

        A_i = (r_i - mean(r)) / std(r)        Shao et al. 2024, section 4.1.2 (outcome supervision)
        A_i = r_i - mean(r)                   Liu et al. 2025, "Understanding R1-Zero-Like Training"

    The division gives groups that are nearly all right, or nearly all wrong, a larger weight.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]), normalize_std=False)
    tensor([[ 0.7500, -0.2500, -0.2500, -0.2500],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    advantages = rewards - rewards.mean(dim=1, keepdim=True)  # (groups, G)
    if normalize_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + STD_EPS)
    # A mean is rounded: three times 0.1 have a mean of 0.10000000000000002.
    return advantages.masked_fill(~has_spread(rewards)[:, None], 0.0)


def has_spread(rewards: Tensor) -> Tensor:
    """Whether the rewards (groups, G) of each group differ, (groups,): else it teaches nothing."""
    return rewards.amax(dim=1) > rewards.amin(dim=1)


# --- log-probabilities of tokens ------------------------------------------------------------------


class TokenScores(NamedTuple):
    """(N, T) each, in fp32; 0 where there is no target."""

    log_probs: Tensor
    """of each target"""
    entropy: Tensor
    """of the distribution that it was drawn from, in nats; without gradient"""


def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> TokenScores:
    """log p of every target under softmax(logits / temperature), from which it was sampled.

    In chunks of tokens, whose logits the backward pass computes again, as for preferences.

    Args:
        hidden: (N, T, D) the decoder's features.
        weight: (V, D) the head.
        labels: (N, T) int64 classes; IGNORE_INDEX marks a token that is not a target.
        temperature: of the sampling.
        softcap: of the head (`Head.softcap`).
    """
    flat_hidden, flat_labels = hidden.flatten(0, 1), labels.flatten()  # (N·T, D), (N·T,)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    log_probs = torch.zeros(flat_labels.shape, dtype=dtype, device=hidden.device)  # (N·T,)
    entropy = torch.zeros_like(log_probs)
    for tokens in target_chunks(flat_labels):
        chunk = (flat_hidden[tokens], weight, flat_labels[tokens], temperature, softcap)
        log_p, spread = checkpoint(_score_chunk, *chunk, use_reentrant=False)  # (M,) each
        log_probs = log_probs.index_add(0, tokens, log_p)
        entropy = entropy.index_add(0, tokens, spread.detach())
    return TokenScores(log_probs.view_as(labels), entropy.view_as(labels))


def _score_chunk(
    inputs: Tensor, weight: Tensor, targets: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """log p and entropy (M,) of one chunk."""
    head = weight.to(head_dtypes(weight)[0])
    logits = head_logits(inputs.to(head.dtype), head, softcap)  # (M, V)
    wide = logits.to(torch.promote_types(head.dtype, torch.float32)) / temperature
    log_p = wide.log_softmax(dim=-1)  # (M, V)
    with torch.no_grad():
        entropy = torch.special.entr(log_p.exp()).sum(dim=-1)  # (M,)
    return log_p.gather(1, targets[:, None]).squeeze(1), entropy


# --- the loss -------------------------------------------------------------------------------------


class PolicyLoss(NamedTuple):
    """(N, T) each; only the entries of targets mean something."""

    loss: Tensor
    clipped: Tensor
    """whether the clipping took the gradient of this token away"""
    kl: Tensor
    """the estimate of the divergence from the reference; 0 without one"""


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    reference_log_probs: Tensor | None,
    grpo: GrpoConfig,
) -> PolicyLoss:
    """The loss of each token, to be minimized.

    With w = p(token) / p_old(token) and the advantage A of its answer:

        - min(w A, clip(w, 1 - clip_low, 1 + clip_high) A) + kl · k3
        k3 = p_ref / p - log(p_ref / p) - 1          an estimate of KL(p, p_ref) that is never negative

    Shao et al. 2024, equations 3 and 4; the clipped objective is PPO's (Schulman et al. 2017,
    equation 7), its two bounds are those of DAPO (Yu et al. 2025, section 3.1), k3 is from Schulman
    2020, "Approximating KL Divergence". A token whose ratio has left the band in the direction
    that its advantage asks for has no gradient: the update has gone far enough there.

    Args:
        log_probs: (N, T) under the policy.
        old_log_probs: (N, T) under the policy as it was when it wrote the answers.
        advantages: (N,) of the answers.
        reference_log_probs: (N, T) under the reference; None if grpo.kl is 0.
        grpo: the settings.
    """
    A = advantages[:, None].to(log_probs.dtype)  # (N, 1)
    ratio = (log_probs - old_log_probs).exp()  # (N, T)
    kept = ratio.clamp(1 - grpo.clip_low, 1 + grpo.clip_high)  # (N, T)
    loss = -torch.minimum(ratio * A, kept * A)  # (N, T)
    clipped = kept * A < ratio * A  # (N, T)
    kl = torch.zeros_like(ratio)
    if reference_log_probs is not None:
        d = reference_log_probs - log_probs  # (N, T)
        kl = d.exp() - d - 1
        loss = loss + grpo.kl * kl
    return PolicyLoss(loss, clipped, kl)


def mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """The mean (N,) over the tokens of each answer; 0 for an answer without any."""
    return (values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def loss_of_answers(
    token_loss: Tensor, mask: Tensor, grpo: GrpoConfig, tokens_per_answer: float
) -> Tensor:
    """The loss (N,) of each answer, whose mean over all answers of a step is the step's loss.

        grpo     1/n Σ_i 1/|o_i| Σ_t loss_it             Shao et al. 2024, equation 3
        dapo     1 / (Σ_i |o_i|) Σ_i Σ_t loss_it         Yu et al. 2025, equation 8
        dr_grpo  1/n Σ_i 1/max_new_tokens Σ_t loss_it    Liu et al. 2025, section 3.2

    With grpo a token of a long answer weighs less than one of a short answer: a long wrong answer
    costs little. With dapo all tokens of a step weigh the same. With dr_grpo a token also weighs
    the same from step to step.

    Args:
        token_loss: (N, T) from `policy_loss`.
        mask: (N, T), the tokens that have a loss.
        grpo: the settings.
        tokens_per_answer: tokens with a loss of all answers of the step, divided by their number.
    """
    if grpo.loss == "grpo":
        return mean_over_tokens(token_loss, mask)
    constant = grpo.max_new_tokens if grpo.loss == "dr_grpo" else max(tokens_per_answer, 1e-9)
    return (token_loss * mask).sum(dim=1) / constant
