"""The loss of distillation: a student learns a teacher's distribution of the next token.

    student (N, D), teacher (N, D') ─▶ chunks of targets ─▶ logits (M, V) of both ─▶ KL, cross entropy

In chunks of tokens, like the cross entropy, so that the logits of both models are never stored for
all tokens. It is exact over the whole vocabulary.

With distill.top_k = K the classes are the K that the teacher finds most probable, and one that has all
others. Both models have K + 1 probabilities that sum to 1, and the divergence of these is at most the
whole one. So little of a teacher can be kept in a file: K numbers for a target and not V.
"""

# N tokens · D width of the student · D' of the teacher · V vocabulary · M tokens of one chunk
# K classes that the teacher's probability is known of

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tinylm.config.finetuning import DistillConfig
from tinylm.model.decoder import Head
from tinylm.objectives.cross_entropy import head_dtypes, head_logits, target_chunks


class DistillLoss(NamedTuple):
    """Sums over targets, scalars in fp32."""

    loss: Tensor
    kl: Tensor
    """the divergence, at the temperature, not multiplied by its square"""
    cross_entropy: Tensor


def distillation_loss(
    hidden: Tensor,
    head: Head,
    teacher: "TeacherFeatures | TeacherScores",
    labels: Tensor,
    distill: DistillConfig,
) -> DistillLoss:
    """The loss of a student, differentiable in `hidden` and the weight of `head`.

        (1 - weight) · (-log p(label)) + weight · temperature² · KL

    With p the student's and q the teacher's distribution at the temperature, KL is Σ q log (q / p)
    (forward) or Σ p log (p / q) (reverse). A higher temperature makes small probabilities count;
    the square keeps the size of its gradient (Hinton et al. 2015, section 2).

    Args:
        hidden: (N, D) the student's features.
        head: its output layer.
        teacher: its features of all tokens, or its scores of the targets; without gradient.
        labels: (N,) int64 classes; IGNORE_INDEX marks a token that is not a target.
        distill: weight, temperature and direction.
    """
    dtype = head_dtypes(head.weight)[1]
    kl = torch.zeros((), dtype=dtype, device=hidden.device)
    cross_entropy = torch.zeros_like(kl)
    n_seen = 0
    for tokens in target_chunks(labels):
        # The backward pass computes the logits of a chunk again, the teacher's too.
        chunk = (hidden[tokens], head.weight, labels[tokens])
        theirs = partial(teacher.of_chunk, tokens, n_seen, distill)
        parts = checkpoint(_chunk_sums, *chunk, theirs, head.softcap, distill, use_reentrant=False)
        kl, cross_entropy = kl + parts[0], cross_entropy + parts[1]
        n_seen += len(tokens)
    w = distill.weight
    loss = (1 - w) * cross_entropy + w * distill.temperature**2 * kl
    return DistillLoss(loss, kl, cross_entropy)


def _chunk_sums(
    inputs: Tensor,
    weight: Tensor,
    targets: Tensor,
    theirs: Callable[[], "TeacherScores"],
    softcap: float | None,
    distill: DistillConfig,
) -> tuple[Tensor, Tensor]:
    """The sums of KL and cross entropy of one chunk."""
    dtype, softmax_dtype = head_dtypes(weight)
    logits = head_logits(inputs.to(dtype), weight.to(dtype), softcap).to(softmax_dtype)  # (M, V)
    log_p = F.log_softmax(logits / distill.temperature, dim=-1)  # (M, V)
    with torch.no_grad():
        log_q, ids = theirs()  # (M, V), or (M, K)
        log_q = log_q.to(softmax_dtype)
        if ids is not None:
            # what is left of 1, and not 0: its logarithm is taken
            rest = (1 - log_q.exp().sum(dim=-1)).clamp(min=torch.finfo(softmax_dtype).eps)
            log_q = torch.cat((log_q, rest.log()[:, None]), dim=-1)  # (M, K + 1)
    if ids is not None:
        others = log_p.scatter(1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True)  # (M, 1)
        log_p = torch.cat((log_p.gather(1, ids), others), dim=-1)  # (M, K + 1)
    if distill.kl == "forward":
        kl = (log_q.exp() * (log_q - log_p)).sum()
    else:
        kl = (log_p.exp() * (log_p - log_q)).sum()
    return kl, F.cross_entropy(logits, targets, reduction="sum")


# --- the teacher ---


class TeacherFeatures(NamedTuple):
    """A teacher that has read the tokens: the logits of a chunk are computed when they are needed."""

    hidden: Tensor
    """(N, D')"""
    head: Head
    """its output layer, with the classes of the student"""

    def of_chunk(self, tokens: Tensor, n_seen: int, distill: DistillConfig) -> "TeacherScores":
        """The scores of the targets at these places."""
        return teacher_scores(self.hidden[tokens], self.head, distill)


class TeacherScores(NamedTuple):
    """What a teacher says of targets, in their order."""

    log_probs: Tensor
    """(N, V), or (N, K) of the most probable classes, at the temperature"""
    ids: Tensor | None
    """(N, K) int64, their numbers; None: all classes"""

    def of_chunk(self, tokens: Tensor, n_seen: int, distill: DistillConfig) -> "TeacherScores":
        """The scores of the next targets after `n_seen`."""
        chunk = slice(n_seen, n_seen + len(tokens))
        return TeacherScores(self.log_probs[chunk], None if self.ids is None else self.ids[chunk])


@torch.no_grad()
def teacher_scores(hidden: Tensor, head: Head, distill: DistillConfig) -> TeacherScores:
    """The scores of targets whose features (M, D') are given."""
    dtype, softmax_dtype = head_dtypes(head.weight)
    logits = head_logits(hidden.to(dtype), head.weight.to(dtype), head.softcap)  # (M, V)
    log_q = F.log_softmax(logits.to(softmax_dtype) / distill.temperature, dim=-1)  # (M, V)
    if distill.top_k is None or distill.top_k >= log_q.size(-1):
        return TeacherScores(log_q, None)
    return TeacherScores(*log_q.topk(distill.top_k, dim=-1))
