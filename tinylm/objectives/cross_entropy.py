"""What training minimises: the cross entropy of the next token, without ever holding all logits.

The head makes the largest tensor of a small language model: 4096 tokens times 50,000 classes are 800 MB of logits, and
as much again for their gradient. Here tokens go through the head a chunk at a time, and a chunk's gradients are worked
out before the next one starts, so that memory does not grow with the number of tokens. Computing the gradient in the
forward pass is the idea of the Liger kernel (Hsu et al. 2024, "FusedLinearCrossEntropy"); this is plain torch. Under
autocast the matrix products are in its dtype, everything after them in fp32. Knows nothing of batches and rows: the
caller flattens them.

After it come the log-probability of whole answers and what direct preference optimisation makes of it.
"""


# N tokens · D model width · V vocabulary · M tokens of one chunk · B answers · T tokens of one

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinylm.tokens.packing import IGNORE_INDEX

# Measured with benchmarks/losses.py at vocabularies of 260 to 50,257: fewer tokens at once keep the matrix products
# waiting for memory, more take memory and time out of the cache.
CHUNK_TOKENS = 512


def cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """The sum over target tokens of -log p(label), a scalar in fp32, differentiable in `hidden` and `weight`.

    With smoothing e the target is 1 - e on the label and e / V on each of the V classes, the label among them (Szegedy
    et al. 2016, section 7; as torch defines it), so that a token costs -(1 - e) log p(label) - e · mean over V of log p.
    It is a sum so that micro-batches and ranks with unequal numbers of targets add up: divide by the count of targets.
    Without any target it is 0 with gradients of 0. It can be differentiated once, and only once: the gradients are
    handed over, not copied.

    Args:
        hidden: (N, D) the decoder's features.
        weight: (V, D) the head.
        labels: (N,) int64 classes; IGNORE_INDEX marks a token that is not a target.
        label_smoothing: e, in [0, 1).
    """
    return _ChunkedCrossEntropy.apply(
        hidden, weight, labels, label_smoothing, torch.is_grad_enabled()
    )


@torch.no_grad()
def score_targets(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum that `cross_entropy` gives without smoothing, and how many targets are the most probable token; two scalars.

    Of equal probabilities the lower id is the most probable one, as greedy decoding has it.
    """
    head = weight.to(_product_dtype(weight))
    total = torch.zeros((), dtype=_softmax_dtype(head), device=hidden.device)
    n_right = torch.zeros((), dtype=torch.long, device=hidden.device)
    for tokens in _target_chunks(labels):
        targets = labels[tokens]
        log_p = _log_probabilities(hidden[tokens].to(head.dtype), head)
        total += _losses(log_p, targets, 0.0).sum()
        n_right += (log_p.argmax(dim=-1) == targets).sum()
        del log_p
    return total, n_right


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The loss and at once, where autograd will ask for them, its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        smoothing: float,
        grad_enabled: bool,
    ) -> Tensor:
        # `needs_input_grad` knows nothing of no_grad, and validation should not pay for gradients.
        wants_hidden, wants_weight = (
            grad_enabled and needed for needed in ctx.needs_input_grad[:2]
        )
        head = weight.to(_product_dtype(weight))
        total = torch.zeros((), dtype=_softmax_dtype(head), device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        # fp32 whatever the products are in: a bf16 sum over the chunks would drop what the later ones add.
        grad_weight = torch.zeros_like(weight, dtype=total.dtype) if wants_weight else None
        for tokens in _target_chunks(labels):
            inputs, targets = hidden[tokens].to(head.dtype), labels[tokens]
            log_p = _log_probabilities(inputs, head)
            total += _losses(log_p, targets, smoothing).sum()
            if wants_hidden or wants_weight:
                grad_logits = _logit_gradient_(log_p, targets, smoothing).to(head.dtype)
                if grad_hidden is not None:
                    grad_hidden[tokens] = (grad_logits @ head).to(grad_hidden.dtype)
                if grad_weight is not None:
                    _add_product_(grad_weight, grad_logits.T, inputs)
                del grad_logits
            del log_p  # or the next chunk would be made beside this one
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        # In place, because here training holds the most memory. A second backward finds the saved tensors changed, and
        # torch raises. Autograd casts each gradient to the dtype of its tensor.
        grad_hidden, grad_weight = (
            None if grad is None else grad.mul_(grad_total) for grad in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, None, None, None


def _product_dtype(weight: Tensor) -> torch.dtype:
    """What the matrix products are in: autocast's dtype where it is on, else the weight's own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _softmax_dtype(head: Tensor) -> torch.dtype:
    """fp32, or fp64 for a head in fp64: in bf16 a sum over 50,000 classes loses its third digit."""
    return torch.promote_types(head.dtype, torch.float32)


def _target_chunks(labels: Tensor) -> tuple[Tensor, ...]:
    """The indices of the tokens that are targets, some at a time; the others never reach the head."""
    return (labels != IGNORE_INDEX).nonzero().squeeze(1).split(CHUNK_TOKENS)


def _log_probabilities(inputs: Tensor, head: Tensor) -> Tensor:
    """log p (M, V) of every class for the tokens `inputs` (M, D)."""
    return F.log_softmax(inputs @ head.T, dim=-1, dtype=_softmax_dtype(head))


def _losses(log_p: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The loss (M,) of each token."""
    of_label = log_p.gather(1, targets[:, None]).squeeze(1)
    return (
        -of_label if smoothing == 0 else -(1 - smoothing) * of_label - smoothing * log_p.mean(dim=1)
    )


def _logit_gradient_(log_p: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The derivative of `_losses` by the logits, p - target distribution (M, V), in the memory of `log_p`."""
    gradient = log_p.exp_()
    if smoothing:
        gradient -= smoothing / gradient.size(1)
    gradient[torch.arange(targets.numel(), device=targets.device), targets] -= 1 - smoothing
    return gradient


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, which may be wider than they are."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
