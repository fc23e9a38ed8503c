"""The loss of language models: the cross entropy of the next token,
without ever storing all logits.

    hidden (N, D) ─▶ chunks of targets (M, D) ─▶ logits (M, V) ─▶ log p ─▶ loss
                                                        └──▶ p - target ─▶ gradients of hidden and head

Why chunks: the logits are the largest tensor of a small language model. 4096 tokens times 50,000
classes are 800 MB in fp32, and their gradient is as large again. Here the head is applied to a
chunk of tokens at a time, and the gradients of a chunk are computed before the next chunk starts,
so that memory does not grow with the number of tokens. To compute the gradient in the forward pass
is the idea of the Liger kernel (Hsu et al. 2024, "FusedLinearCrossEntropy"); this is plain torch.

Precision: matrix products are in autocast's dtype, everything after them in fp32. A bf16 sum over
50,000 classes loses its third digit.

Knows nothing of batches and rows: callers flatten them. preferences.py uses the same chunks.
"""


# N tokens · D model width · V vocabulary · M tokens of one chunk

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinylm.tokens.packing import IGNORE_INDEX

# Measured with benchmarks/losses.py at vocabularies of 260 to 50,257: with smaller chunks the
# matrix products wait for memory, larger ones no longer fit in the processor's cache.
CHUNK_TOKENS = 512


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The sum over targets of -log p(label), a scalar in fp32,
    differentiable in `hidden` and `weight`.

    It is a sum, not a mean, so that micro-batches and ranks with unequal numbers of targets add up;
    divide by the number of targets of the whole step. Without any target it is 0, with gradients of
    0.

    With smoothing e, the target distribution is 1 - e on the label plus e / V on each of the V
    classes (Szegedy et al. 2016, section 7): a token costs -(1 - e) log p(label) - e · mean over
    classes of log p.

    It can be differentiated only once: the gradients are handed over, not copied.

    Args:
        hidden: (N, D) the decoder's features.
        weight: (V, D) the head.
        labels: (N,) int64 classes; IGNORE_INDEX marks a token that is not a target.
        label_smoothing: e, in [0, 1).
        softcap: of the head (`Head.softcap`).
    """
    # Inside an autograd function grad mode is always off, so it is read here.
    grad_enabled = torch.is_grad_enabled()
    return _ChunkedCrossEntropy.apply(
        hidden, weight, labels, label_smoothing, softcap, grad_enabled
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The loss, and in the same pass the gradients that autograd will ask for.

    Of one token with logits z = W h, p = softmax(z) and target distribution q:

        loss = -Σ q log p        dloss/dz = p - q        dloss/dh = Wᵀ (p - q)        dloss/dW = (p - q) hᵀ

    With a soft cap c, z = c tanh(W h / c), and p - q is multiplied by dz/d(W h) = 1 - (z / c)².
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        smoothing: float,
        softcap: float | None,
        grad_enabled: bool,
    ) -> Tensor:
        # Under no_grad (validation) no gradient is computed, though needs_input_grad is still true.
        grad_hidden = grad_weight = None
        product_dtype, softmax_dtype = head_dtypes(weight)
        if grad_enabled and ctx.needs_input_grad[0]:
            grad_hidden = torch.zeros_like(hidden)  # (N, D)
        if grad_enabled and ctx.needs_input_grad[1]:
            # fp32 also under autocast: a bf16 sum over chunks would round the later ones away
            grad_weight = torch.zeros_like(weight, dtype=softmax_dtype)  # (V, D)
        head = weight.to(product_dtype)  # (V, D)
        total = torch.zeros((), dtype=softmax_dtype, device=hidden.device)
        for tokens in target_chunks(labels):
            inputs, targets = hidden[tokens].to(product_dtype), labels[tokens]  # (M, D), (M,)
            # The loss of each token.
            log_p = log_probabilities(inputs, head, softcap)  # (M, V)
            losses = -log_p.gather(1, targets[:, None]).squeeze(1)  # (M,)
            if smoothing:
                losses = (1 - smoothing) * losses - smoothing * log_p.mean(dim=1)
            total += losses.sum()
            if grad_hidden is None and grad_weight is None:
                del log_p  # otherwise the next chunk would be allocated beside this one
                continue
            # p - q, in the memory of log p.
            p_minus_q = log_p.exp_()  # (M, V)
            if smoothing:
                p_minus_q -= smoothing / p_minus_q.size(1)
            rows = torch.arange(targets.numel(), device=targets.device)  # (M,)
            p_minus_q[rows, targets] -= 1 - smoothing
            if softcap is not None:
                p_minus_q *= 1 - (head_logits(inputs, head, softcap) / softcap).square()
            # Through the head, to the hidden states and to the weights.
            grad_logits = p_minus_q.to(product_dtype)  # (M, V)
            del log_p, p_minus_q
            if grad_hidden is not None:
                grad_hidden[tokens] = (grad_logits @ head).to(grad_hidden.dtype)  # (M, D)
            if grad_weight is not None and grad_weight.dtype == product_dtype:
                grad_weight.addmm_(grad_logits.T, inputs)  # (V, D)
            elif grad_weight is not None:
                grad_weight += grad_logits.T @ inputs  # (V, D)
            del grad_logits
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        # In place, because this is where training holds the most memory. A second backward pass
        # finds the saved tensors changed, and torch raises. Autograd casts each gradient to its
        # tensor's dtype.
        grad_hidden, grad_weight = (
            None if grad is None else grad.mul_(grad_total) for grad in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, None, None, None, None


@torch.no_grad()
def score_targets(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The sum of `cross_entropy` without smoothing,
    and how many targets are the most probable token.

    Of equally probable tokens the one with the lower id counts, as in greedy decoding.
    """
    product_dtype, softmax_dtype = head_dtypes(weight)
    head = weight.to(product_dtype)
    total = torch.zeros((), dtype=softmax_dtype, device=hidden.device)
    n_right = torch.zeros((), dtype=torch.long, device=hidden.device)
    for tokens in target_chunks(labels):
        targets = labels[tokens]  # (M,)
        log_p = log_probabilities(hidden[tokens].to(product_dtype), head, softcap)  # (M, V)
        total += (-log_p.gather(1, targets[:, None]).squeeze(1)).sum()
        n_right += (log_p.argmax(dim=-1) == targets).sum()
        del log_p  # otherwise the next chunk would be allocated beside this one
    return total, n_right


# --- shared with preferences.py -------------------------------------------------------------------


def head_dtypes(weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the head's products (autocast's where it is on) and of the softmax
    (at least fp32).
    """
    device = weight.device.type
    product = weight.dtype
    if torch.is_autocast_enabled(device):
        product = torch.get_autocast_dtype(device)
    return product, torch.promote_types(product, torch.float32)


def target_chunks(labels: Tensor) -> tuple[Tensor, ...]:
    """The indices (M,) of the targets among labels (N,), in chunks;
    other tokens never reach the head.
    """
    return (labels != IGNORE_INDEX).nonzero().squeeze(1).split(CHUNK_TOKENS)


def head_logits(inputs: Tensor, head: Tensor, softcap: float | None) -> Tensor:
    """The logits (M, V) of the tokens `inputs` (M, D); with a soft cap, at least fp32."""
    logits = inputs @ head.T  # (M, V)
    if softcap is None:
        return logits
    wide = logits.to(torch.promote_types(head.dtype, torch.float32))
    return softcap * (wide / softcap).tanh()


def log_probabilities(inputs: Tensor, head: Tensor, softcap: float | None = None) -> Tensor:
    """log p (M, V) of every class for the tokens `inputs` (M, D); at least fp32."""
    logits = head_logits(inputs, head, softcap)  # (M, V)
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(head.dtype, torch.float32))
