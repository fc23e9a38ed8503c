"""Learning from preferences: DPO, IPO, the hinge loss of SLiC, and without a reference model ORPO
and SimPO; all are computed from log-probabilities of answers.

    batch ─▶ `score_pairs`: both answers in one forward pass ─▶ log p of each, under policy and reference
          ─▶ `compare_pairs`: `preference_loss` of each pair, and the sums of METRICS

In reading order: the log-probability of an answer, the losses, and what one batch contributes.
Where the reference's log-probabilities come from (a frozen copy, adapters switched off, a cache) is
decided in training/stages; how a row becomes a pair, in rows/preferences.py.
"""


# B pairs or answers · T tokens of one · N = B·T tokens · D model width · V vocabulary
# M tokens of a chunk

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tinylm.config.schema import DpoConfig
from tinylm.model.decoder import Features, Head
from tinylm.objectives.cross_entropy import head_dtypes, log_probabilities, target_chunks
from tinylm.tokens.packing import IGNORE_INDEX

# Columns of metrics.csv, means over pairs. Rewards are those of `PreferenceLoss`; accuracy is the
# fraction of pairs whose chosen answer has the higher reward.
METRICS = (
    "rewards_chosen",
    "rewards_rejected",
    "margin",
    "accuracy",
    "logp_chosen",
    "logp_rejected",
)


# --- log-probabilities of answers -----------------------------------------------------------------


def answer_log_probs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, softcap: float | None = None
) -> Tensor:
    """log p (B,) of each answer, in fp32: the sum of log p(label) over its target tokens.

    In chunks of tokens, like the cross entropy; here the backward pass recomputes a chunk's logits,
    because the gradient of each answer is only known after the loss of all.

    Args:
        hidden: (B, T, D) the decoder's features.
        weight: (V, D) the head.
        labels: (B, T) int64 classes; IGNORE_INDEX marks a token that is not a target.
        softcap: of the head (`Head.softcap`).
    """
    flat_hidden, flat_labels = hidden.flatten(0, 1), labels.flatten()  # (N, D), (N,)
    # fp32 whatever autocast says: long answers are sums of hundreds of terms
    dtype = torch.promote_types(weight.dtype, torch.float32)
    totals = torch.zeros(labels.size(0), dtype=dtype, device=hidden.device)  # (B,)
    for tokens in target_chunks(flat_labels):
        inputs, targets = flat_hidden[tokens], flat_labels[tokens]  # (M, D), (M,)
        chunk = (inputs, weight, targets, softcap)
        log_p = checkpoint(_label_log_probs, *chunk, use_reentrant=False)  # (M,)
        # Token index // T is the answer that the token belongs to.
        totals = totals.index_add(0, tokens // labels.size(1), log_p)
    return totals


def _label_log_probs(
    inputs: Tensor, weight: Tensor, targets: Tensor, softcap: float | None
) -> Tensor:
    """log p (M,) of the targets of one chunk."""
    head = weight.to(head_dtypes(weight)[0])
    log_p = log_probabilities(inputs.to(head.dtype), head, softcap)  # (M, V)
    return log_p.gather(1, targets[:, None]).squeeze(1)


# --- the losses -----------------------------------------------------------------------------------


class Answers(NamedTuple):
    """One value for each of the two answers of a pair, (B,) each."""

    chosen: Tensor
    rejected: Tensor


class PreferenceLoss(NamedTuple):
    """(B,) each."""

    loss: Tensor
    chosen_reward: Tensor
    """beta · (log p - log p_ref), the policy's implicit reward
    (Rafailov et al. 2023, equation 5); without a reference, beta · log p per token
    (Meng et al. 2024, equation 4)"""
    rejected_reward: Tensor


def preference_loss(
    policy: Answers, reference: Answers | None, lengths: Answers, dpo: DpoConfig
) -> PreferenceLoss:
    """How far the policy is from preferring each chosen answer, by the loss that `dpo.loss` names.

    Args:
        policy: log-probabilities under the trained model.
        reference: log-probabilities under the model that it must stay close to;
            None for orpo and simpo, which have no such model.
        lengths: target tokens of the answers.
        dpo: the loss and its settings.
    """
    if dpo.loss == "orpo":
        return orpo_loss(policy, lengths, dpo)
    if dpo.loss == "simpo":
        return simpo_loss(policy, lengths, dpo)
    if reference is None:
        raise ValueError(f"loss {dpo.loss} needs the log-probabilities under a reference")
    return reference_loss(policy, reference, lengths, dpo)


def reference_loss(
    policy: Answers, reference: Answers, lengths: Answers, dpo: DpoConfig
) -> PreferenceLoss:
    """The losses that compare the policy with a reference model.

    With h = (log p - log p_ref) of the chosen answer, minus the same of the rejected one:

        sigmoid  -(1 - e) log σ(beta h) - e log σ(-beta h)   Rafailov et al. 2023, equation 7 (DPO);
                                                             e: Mitchell 2023 (conservative DPO)
        hinge    max(0, 1 - beta h)                          Zhao et al. 2023 (SLiC)
        ipo      (h - 1 / (2 beta))²                         Azar et al. 2023, equation 17 (IPO)

    ipo takes the log-probabilities per token of their answer, as its authors' code does; the other
    two do so with dpo.length_normalized, so that long answers do not weigh more.
    """
    # log p - log p_ref of each answer
    chosen = policy.chosen - reference.chosen  # (B,)
    rejected = policy.rejected - reference.rejected  # (B,)
    per_token = dpo.loss == "ipo" or dpo.length_normalized
    n_chosen, n_rejected = lengths if per_token else (1, 1)
    h = chosen / n_chosen - rejected / n_rejected  # (B,)
    if dpo.loss == "ipo":
        loss = (h - 1 / (2 * dpo.beta)).square()
    elif dpo.loss == "hinge":
        loss = F.relu(1 - dpo.beta * h)
    else:
        e = dpo.label_smoothing
        loss = -(1 - e) * F.logsigmoid(dpo.beta * h) - e * F.logsigmoid(-dpo.beta * h)
    return PreferenceLoss(loss, dpo.beta * chosen.detach(), dpo.beta * rejected.detach())


def simpo_loss(policy: Answers, lengths: Answers, dpo: DpoConfig) -> PreferenceLoss:
    """Simple preference optimization (Meng et al. 2024, equation 6): the log-probability per token
    is the reward, and the chosen answer's must be higher by the margin gamma.

        -log σ(beta log p(chosen) / |chosen| - beta log p(rejected) / |rejected| - gamma)
    """
    assert dpo.gamma is not None, "the config resolves it"
    chosen = dpo.beta * policy.chosen / lengths.chosen  # (B,)
    rejected = dpo.beta * policy.rejected / lengths.rejected  # (B,)
    loss = -F.logsigmoid(chosen - rejected - dpo.gamma)
    return PreferenceLoss(loss, chosen.detach(), rejected.detach())


def orpo_loss(policy: Answers, lengths: Answers, dpo: DpoConfig) -> PreferenceLoss:
    """Odds ratio preference optimization (Hong et al. 2024, equations 3 to 7): the cross entropy of
    the chosen answer, plus beta (lambda in the paper) times the odds ratio loss.

        -log P(chosen) - beta log σ(log (odds(chosen) / odds(rejected)))

    P is the geometric mean of the tokens' probabilities: log P = log p / |answer|.
    odds = P / (1 - P).
    """
    chosen = policy.chosen / lengths.chosen  # (B,) log P
    rejected = policy.rejected / lengths.rejected  # (B,)
    log_ratio = _log_odds(chosen) - _log_odds(rejected)  # (B,)
    loss = -chosen - dpo.beta * F.logsigmoid(log_ratio)
    return PreferenceLoss(loss, dpo.beta * chosen.detach(), dpo.beta * rejected.detach())


def _log_odds(log_p: Tensor) -> Tensor:
    """log (P / (1 - P)) from log P."""
    # P = 1, to which fp32 rounds, has infinite odds and a gradient of NaN.
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return log_p - torch.log(-torch.expm1(log_p))


# --- one batch ------------------------------------------------------------------------------------


class PairScores(NamedTuple):
    """The answers of a batch of pairs under one model."""

    log_probs: Answers
    lengths: Answers
    """(B,) target tokens of each answer; 0 in a row of padding"""
    balance_loss: Tensor
    """of a mixture of experts; else 0"""


def score_pairs(features: Callable[..., Features], head: Head, batch: dict[str, Any]) -> PairScores:
    """The log-probabilities of all answers of `batch`, chosen and rejected in one forward pass.

    Args:
        features: `Decoder.features`, compiled or not.
        head: the layer that scores tokens.
        batch: `chosen_ids`, `chosen_labels`, `rejected_ids`, `rejected_labels` (B, T).
    """
    ids = torch.cat((batch["chosen_ids"], batch["rejected_ids"]))  # (2B, T)
    labels = torch.cat((batch["chosen_labels"], batch["rejected_labels"]))  # (2B, T)
    hidden, balance_loss = features(ids)  # (2B, T, D)
    log_probs = answer_log_probs(hidden, head.weight, labels, softcap=head.softcap)  # (2B,)
    lengths = (labels != IGNORE_INDEX).sum(dim=1)  # (2B,)
    return PairScores(Answers(*log_probs.chunk(2)), Answers(*lengths.chunk(2)), balance_loss)


class Comparison(NamedTuple):
    """A policy's preferences, on the n pairs of a batch that are not padding."""

    loss: Tensor
    """(n,)"""
    cross_entropy: Tensor
    """(n,) of the chosen answer, per token"""
    metrics: Tensor
    """(len(METRICS),) sums over the pairs"""


def compare_pairs(policy: PairScores, reference: Answers | None, dpo: DpoConfig) -> Comparison:
    """The preference loss of each pair, and the sums of METRICS.

    Args:
        policy: the answers under the trained model.
        reference: as `preference_loss` takes it.
        dpo: the loss and its settings.
    """
    # Rows of padding have no target.
    real = policy.lengths.chosen > 0  # (B,)
    own = Answers(*(part[real] for part in policy.log_probs))  # (n,) each
    theirs = None if reference is None else Answers(*(part[real] for part in reference))
    lengths = Answers(*(part[real] for part in policy.lengths))
    loss, chosen, rejected = preference_loss(own, theirs, lengths, dpo)  # (n,) each
    columns = (chosen, rejected, chosen - rejected, chosen > rejected, *own)  # as in METRICS
    sums = [column.detach().float().sum() for column in columns]
    return Comparison(loss, -own.chosen / lengths.chosen, torch.stack(sums))
