"""The optimizers: SGD, AdamW and Muon, written out to be read, and torch's fused AdamW, the default.

In reading order: `make_optimizer` and `set_lr`, which training uses; `parameter_groups`, which weights decay; then the
optimizers, each a single `update` of one weight. All keep numbers, strings and tensors only in `state_dict()`, and
going on from one gives the same bits as never having stopped. The schedule lives in `tinylm/optim/schedule.py`; clipping and
the check for finite gradients belong to whoever calls `step`, and must come before it.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tinylm.config.schema import TrainingConfig


def make_optimizer(
    model: nn.Module, training: TrainingConfig, *, fused: bool
) -> torch.optim.Optimizer:
    """The optimizer that `training.optimizer` names, over every weight of `model` that is trained.

    `fused` takes torch's one-kernel AdamW where the optimizer is torch's own; those written out here have no such form.
    Each group carries `peak_lr`, the learning rate that the schedule's multiplier scales.
    """
    groups = parameter_groups(model, training.weight_decay, muon=training.optimizer == "muon")
    adamw = {"lr": training.lr, "betas": training.betas, "eps": training.eps}
    optimizer: torch.optim.Optimizer
    if training.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, **adamw, fused=fused)
    elif training.optimizer == "adamw_plain":
        optimizer = AdamW(groups, **adamw)
    elif training.optimizer == "sgd":
        optimizer = SGD(groups, lr=training.lr)
    else:
        optimizer = MuonAdamW(groups, **adamw, muon_lr=training.muon_lr, momentum=training.momentum)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    """Give every group of an optimizer of `make_optimizer` its peak learning rate times `multiplier`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * multiplier


# --- which weights decay, and which are Muon's ------------------------------------------------------------------------


def parameter_groups(
    model: nn.Module, weight_decay: float, *, muon: bool = False
) -> list[dict[str, Any]]:
    """The trained weights of `model` as optimizer groups, each weight once, also where two modules share it.

    Matrices decay: linear layers, experts, and the embeddings too, as in GPT-2's training and nanoGPT's. Norms, biases
    and attention sinks do not. With `muon`, the matrices inside the blocks become a group of their own, marked
    `"muon": True`; embeddings and head stay with AdamW (Jordan 2024). A fused matrix, such as query, key and value in
    one, is one matrix to Muon.
    """
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    decayed = [(name, weight) for name, weight in named if is_matrix(name, weight)]
    vectors = [weight for name, weight in named if not is_matrix(name, weight)]
    for_muon = [weight for name, weight in decayed if muon and "blocks" in name.split(".")]
    for_adamw = [weight for name, weight in decayed if not (muon and "blocks" in name.split("."))]
    groups = [
        {"params": for_muon, "weight_decay": weight_decay, "muon": True},
        {"params": for_adamw, "weight_decay": weight_decay, "muon": False},
        {"params": vectors, "weight_decay": 0.0, "muon": False},
    ]
    return [group for group in groups if group["params"]]


def is_matrix(name: str, weight: Tensor) -> bool:
    """Whether a weight multiplies: two dimensions or more (experts stack matrices), and neither a bias nor a sink.

    The experts' biases (E, F) and the sinks (G, n_sinks, K) have several dimensions, but are lists of vectors.
    """
    last = name.rpartition(".")[2]
    return weight.ndim >= 2 and not last.endswith("bias") and not last.startswith("sink")


# --- the optimizers ---------------------------------------------------------------------------------------------------


class WeightwiseOptimizer(torch.optim.Optimizer):
    """An optimizer that treats each weight by itself: a subclass says how one is updated."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every weight that has a gradient; the loss of `closure`, which computes it, comes back."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.update(weight, weight.grad, self.state[weight], group)
        return loss

    @abstractmethod
    def update(
        self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Change `weight` in place; `state` is what this optimizer remembers of it, empty at first."""


class SGD(WeightwiseOptimizer):
    """Gradient descent whose learning rate falls with the number t of updates before: lr / sqrt(t + 1)."""

    def __init__(self, params: Iterable[Any], *, lr: float):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    def update(
        self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """One step, with the same decoupled decay as AdamW's."""
        t = state.setdefault("t", 0)
        lr = group["lr"] / math.sqrt(t + 1)
        weight.mul_(1 - lr * group["weight_decay"]).sub_(grad, alpha=lr)
        state["t"] = t + 1


class AdamW(WeightwiseOptimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2)."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def update(
        self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """One step of `adamw_update`."""
        adamw_update(weight, grad, state, group)


def adamw_update(
    weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> None:
    """One step of AdamW.

    m ← β₁ m + (1 - β₁) g            running mean of the gradient
    v ← β₂ v + (1 - β₂) g²           running mean of its square
    m̂ = m / (1 - β₁ᵗ)                both means start at 0: without this the first
    v̂ = v / (1 - β₂ᵗ)                steps would divide small by small
    θ ← θ - lr · m̂ / (√v̂ + ε) - lr · λ · θ
    """
    if not state:
        state.update(t=0, m=torch.zeros_like(weight), v=torch.zeros_like(weight))
    state["t"] += 1
    lr, (beta1, beta2) = group["lr"], group["betas"]
    m = state["m"].mul_(beta1).add_(grad, alpha=1 - beta1)
    v = state["v"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    m_scale, v_scale = 1 - beta1 ** state["t"], 1 - beta2 ** state["t"]
    root = v.sqrt().div_(math.sqrt(v_scale)).add_(group["eps"])
    weight.mul_(1 - lr * group["weight_decay"]).addcdiv_(m, root, value=-lr / m_scale)


class MuonAdamW(WeightwiseOptimizer):
    """Muon for the groups marked `"muon": True`, AdamW for the others, in one optimizer with one state.

    Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) takes the momentum of a matrix's gradient and replaces
    it by the nearest orthogonal matrix, so that every direction moves equally far. The step is scaled by
    sqrt(max(1, rows / columns)), as in his code and in torch.optim.Muon's default; decay is decoupled.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        muon_lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ):
        groups = [{"lr": muon_lr if group["muon"] else lr, **group} for group in params]
        super().__init__(
            groups,
            {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum, "weight_decay": 0.0},
        )

    def update(
        self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """One step of Muon or of AdamW, as the group is marked."""
        if group["muon"]:
            muon_update(weight, grad, state, group)
        else:
            adamw_update(weight, grad, state, group)


def muon_update(weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """One step of Muon for a matrix, or for each matrix (E, rows, columns) of a stack.

    b ← μ b + (1 - μ) g                                  momentum
    o = orthogonal(μ b + (1 - μ) g)                      one step ahead, as Nesterov looks
    θ ← θ - lr · λ · θ - lr · √max(1, rows / columns) · o
    """
    if not state:
        state["momentum"] = torch.zeros_like(weight)
    lr, momentum = group["lr"], group["momentum"]
    running = state["momentum"].lerp_(grad, 1 - momentum)
    ahead = grad.lerp(running, momentum)
    # On a GPU bf16 is several times faster, and the update need not be exact; not every CPU has it in hardware.
    update = orthogonal(ahead.to(torch.bfloat16) if ahead.is_cuda else ahead)
    rows, columns = weight.shape[-2:]
    weight.mul_(1 - lr * group["weight_decay"]).sub_(
        update.to(weight.dtype), alpha=lr * math.sqrt(max(1, rows / columns))
    )


# The quintic a x + b x³ + c x⁵ of Jordan 2024: steepest at 0 among those that settle near 1, so that five rounds bring
# singular values from 0.01 up to between 0.7 and 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


def orthogonal(matrix: Tensor) -> Tensor:
    """Roughly U Vᵀ where `matrix` is U S Vᵀ: the same singular vectors, all singular values near 1.

    Newton-Schulz: an odd polynomial of a matrix is the polynomial of its singular values, and five rounds of one cost
    only products, where a decomposition would be slow. The last two dimensions are the matrix; others are a batch.
    """
    tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if tall else matrix  # the product with its own transpose is then the smaller one
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(
        min=1e-7
    )  # no singular value above 1, where the quintic diverges
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
