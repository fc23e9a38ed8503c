"""The optimizers: SGD, AdamW and Muon, written out to be read, and torch's fused AdamW,
the default.

    gradients ─▶ (clipped by the training step) ─▶ set_lr ─▶ optimizer.step ─▶ one update rule per weight

In reading order: `make_optimizer` and `set_lr`, which training uses; `parameter_groups`, which
decides which weights decay and which are Muon's; `WeightwiseOptimizer`, a loop over weights; and
the update rules, each a function of one weight: `sgd_update`, `adamw_update`, `muon_update`.

`state_dict()` holds only numbers, strings and tensors, and a run resumed from one continues to the
same bits. Knows nothing of schedules (schedule.py), of clipping, or of the check for finite
gradients: the training step does these before it calls `step`.
"""


# θ weight · g gradient · t update, from 1 · lr learning rate · λ weight decay · E experts

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tinylm.config.schema import TrainingConfig

UpdateRule = Callable[[Tensor, Tensor, dict[str, Any], dict[str, Any]], None]
"""Changes a weight in place, given its gradient, its state
(empty at first) and its group's settings."""


def make_optimizer(
    model: nn.Module, training: TrainingConfig, *, fused: bool
) -> torch.optim.Optimizer:
    """The optimizer that `training.optimizer` names, over all trained weights of `model`.

    `fused` selects torch's one-kernel AdamW; the optimizers written out here have no such form.
    Each group has a `peak_lr`, the learning rate that the schedule's multiplier scales.
    """
    kind = training.optimizer
    groups = parameter_groups(model, training.weight_decay, muon=kind == "muon")
    adamw = {"lr": training.lr, "betas": training.betas, "eps": training.eps}
    optimizer: torch.optim.Optimizer
    if kind == "adamw":
        optimizer = torch.optim.AdamW(groups, **adamw, fused=fused)
    elif kind == "adamw_plain":
        optimizer = WeightwiseOptimizer(groups, adamw_update, **adamw)
    elif kind == "sgd":
        optimizer = WeightwiseOptimizer(groups, sgd_update, lr=training.lr)
    else:
        # Muon moves each matrix by a fixed length, so its learning rate is another one than
        # AdamW's.
        for group in groups:
            group["lr"] = training.muon_lr if group["muon"] else training.lr
        optimizer = WeightwiseOptimizer(groups, adamw_update, **adamw, momentum=training.momentum)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    """Set the learning rate of each group of `make_optimizer` to its peak times `multiplier`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * multiplier


# --- which weights decay, and which are Muon's ----------------------------------------------------


def parameter_groups(
    model: nn.Module, weight_decay: float, *, muon: bool = False
) -> list[dict[str, Any]]:
    """The trained weights of `model` in optimizer groups, each weight once, shared ones included.

        matrices of the blocks            decay        Muon if `muon`, else AdamW
        embeddings, head                  decay        AdamW (Jordan 2024)
        norms, biases, attention sinks    no decay     AdamW

    Embeddings decay as in GPT-2 and nanoGPT. A fused matrix, such as query, key and value in one,
    is one matrix to Muon. The experts' biases (E, F) and the sinks (G, n_sinks, K) have several
    dimensions but are lists of vectors.
    """
    muon_matrices, matrices, vectors = [], [], []
    for name, weight in model.named_parameters():
        *path, last = name.split(".")
        if not weight.requires_grad:
            continue
        if weight.ndim < 2 or last.endswith("bias") or last.startswith("sink"):
            vectors.append(weight)
        elif muon and "blocks" in path:
            muon_matrices.append(weight)
        else:
            matrices.append(weight)
    groups = [
        {"params": muon_matrices, "weight_decay": weight_decay, "muon": True},
        {"params": matrices, "weight_decay": weight_decay, "muon": False},
        {"params": vectors, "weight_decay": 0.0, "muon": False},
    ]
    return [group for group in groups if group["params"]]


# --- the optimizer: a loop over weights -----------------------------------------------------------


class WeightwiseOptimizer(torch.optim.Optimizer):
    """Updates each weight separately: by `muon_update` in groups marked "muon",
    by `update` in the others.

    `settings` are the defaults of all groups, such as lr, betas, eps, weight_decay and momentum.
    """

    def __init__(self, params: Iterable[Any], update: UpdateRule, **settings: Any):
        super().__init__(params, {"weight_decay": 0.0, "muon": False, **settings})
        self.update = update

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every weight that has a gradient; returns the loss of `closure`,
        which computes them.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = muon_update if group["muon"] else self.update
            for weight in group["params"]:
                if weight.grad is not None:
                    update(weight, weight.grad, self.state[weight], group)
        return loss


# --- the update rules -----------------------------------------------------------------------------


def sgd_update(weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Gradient descent whose learning rate falls with the root of the updates so far.

    θ ← θ - lr/√t · λ · θ - lr/√t · g
    """
    t = state.setdefault("t", 0)
    lr = group["lr"] / math.sqrt(t + 1)
    # Decay and step in place: shrink the weight, then go against the gradient.
    weight.mul_(1 - lr * group["weight_decay"]).sub_(grad, alpha=lr)
    state["t"] = t + 1


def adamw_update(
    weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019, algorithm 2).

        m ← β₁ m + (1 - β₁) g            running mean of the gradient: where to go
        v ← β₂ v + (1 - β₂) g²           running mean of its square: how far gradients usually reach
        m̂ = m / (1 - β₁ᵗ)                both means start at 0 and are too small at first;
        v̂ = v / (1 - β₂ᵗ)                the division corrects exactly that
        θ ← θ - lr · m̂ / (√v̂ + ε) - lr · λ · θ

    Each weight moves by about lr per step whatever the size of its gradient. The decay is
    "decoupled": it acts on the weight, not through the gradient, so that v does not shrink it away.
    """
    if not state:
        state.update(t=0, m=torch.zeros_like(weight), v=torch.zeros_like(weight))
    state["t"] += 1
    t, lr, (beta1, beta2) = state["t"], group["lr"], group["betas"]
    # m and v, in place
    m = state["m"].mul_(beta1).add_(grad, alpha=1 - beta1)
    v = state["v"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # √v̂ + ε; m is corrected by the learning rate below: a number, not a tensor
    denominator = v.sqrt().div_(math.sqrt(1 - beta2**t)).add_(group["eps"])
    # decay, then θ ← θ - (lr / (1 - β₁ᵗ)) · m / (√v̂ + ε)
    weight.mul_(1 - lr * group["weight_decay"])
    weight.addcdiv_(m, denominator, value=-lr / (1 - beta1**t))


def muon_update(weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """One step of Muon for a matrix, or for each matrix (E, rows, columns) of a stack.

        b ← μ b + (1 - μ) g                                  momentum
        o = orthogonalize(μ b + (1 - μ) g)                   Nesterov: momentum one step ahead
        θ ← θ - lr · λ · θ - lr · √max(1, rows / columns) · o

    Jordan 2024, https://kellerjordan.github.io/posts/muon/. The momentum of a matrix usually has a
    few large singular values; the nearest orthogonal matrix has all of them 1, so that the rare
    directions learn as fast as the frequent ones. The scale with rows / columns is that of his code
    and the default of torch.optim.Muon.
    """
    if not state:
        state["momentum"] = torch.zeros_like(weight)
    lr, momentum = group["lr"], group["momentum"]
    # b, and one step ahead
    running = state["momentum"].lerp_(grad, 1 - momentum)
    ahead = grad.lerp(running, momentum)
    # bf16 on a GPU: several times faster, and the result need not be exact. Not all CPUs have bf16
    # units.
    update = orthogonalize(ahead.to(torch.bfloat16) if ahead.is_cuda else ahead)
    rows, columns = weight.shape[-2:]
    scale = math.sqrt(max(1, rows / columns))
    # decay, then the step
    weight.mul_(1 - lr * group["weight_decay"]).sub_(update.to(weight.dtype), alpha=lr * scale)


# The quintic p(x) = a x + b x³ + c x⁵ of Jordan 2024. Of the polynomials that settle near 1 it is
# the steepest at 0: five rounds bring singular values from 0.01 up to between 0.7 and 1.2. They do
# not converge to exactly 1, which the update does not need.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


def orthogonalize(matrix: Tensor) -> Tensor:
    """About U Vᵀ where `matrix` is U S Vᵀ: the same singular vectors, all singular values near 1.

    Newton-Schulz iteration. An odd polynomial of a matrix acts on its singular values alone:

        a X + b (X Xᵀ) X + c (X Xᵀ)² X  =  U (a S + b S³ + c S⁵) Vᵀ

    so p can be applied by matrix products, without the slow decomposition. The last two dimensions
    are the matrix, others are a batch.
    """
    # Work on the wide form: X Xᵀ is then the smaller of the two products.
    tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if tall else matrix  # (..., r, c) with r <= c
    # Divide by the Frobenius norm, which is at least the largest singular value: above 1 p
    # diverges.
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        gram = x @ x.mT  # (..., r, r): X Xᵀ
        x = a * x + (b * gram + c * gram @ gram) @ x  # (..., r, c)
    return x.mT if tall else x
