"""The optimizers: SGD, AdamW and Muon, written out to be read, and torch's fused AdamW,
the default. AdamW with moments in 8 bits is in adamw_8bit.py.

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
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as torch_adamw

# adamw_8bit is imported at its first use
from tinylm import optim
from tinylm.common.errors import UserError
from tinylm.config.schema import TrainingConfig

UpdateRule = Callable[[Tensor, Tensor, dict[str, Any], dict[str, Any]], None]
"""Changes a weight in place, given its gradient, its state
(empty at first) and its group's settings."""

NO_RATES: Mapping[str, float | None] = {}


def make_optimizer(
    model: nn.Module, training: TrainingConfig, *, fused: bool
) -> torch.optim.Optimizer:
    """The optimizer that `training.optimizer` names, over all trained weights of `model`.

    `fused` selects torch's one-kernel AdamW, also for the weights that Muon leaves to AdamW; the
    other optimizers written out here have no such form.
    Each group has a `peak_lr`, the learning rate that the schedule's multiplier scales.
    """
    kind = training.optimizer
    groups = parameter_groups(
        model,
        training.weight_decay,
        muon=kind == "muon",
        rates={"embedding": training.embedding_lr, "head": training.head_lr},
        head_dim=model.config.head_dim if training.muon_per_head else None,
    )
    adamw = {"lr": training.lr, "betas": training.betas, "eps": training.eps}
    optimizer: torch.optim.Optimizer
    if kind == "adamw":
        optimizer = torch.optim.AdamW(groups, **adamw, fused=fused)
    elif kind == "adamw_plain":
        optimizer = WeightwiseOptimizer(groups, adamw_update, **adamw)
    elif kind == "adamw_8bit":
        optimizer = optim.adamw_8bit.make_adamw_8bit(groups, **adamw)
    elif kind == "sgd":
        optimizer = WeightwiseOptimizer(groups, sgd_update, lr=training.lr)
    else:
        # Muon moves each matrix by a fixed length, so its learning rate is another one than
        # AdamW's.
        for group in groups:
            group.setdefault("lr", training.muon_lr if group["muon"] else training.lr)
        muon = {"momentum": training.momentum, "rounds": training.muon_rounds, "heads": None}
        update = fused_adamw_update if fused else adamw_update
        optimizer = WeightwiseOptimizer(groups, update, **adamw, **muon)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    """Set the learning rate of each group of `make_optimizer` to its peak times `multiplier`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * multiplier


# --- which weights decay, and which are Muon's ----------------------------------------------------


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    muon: bool = False,
    rates: Mapping[str, float | None] = NO_RATES,
    head_dim: int | None = None,
) -> list[dict[str, Any]]:
    """The trained weights of `model` in optimizer groups, each weight once, shared ones included.

        matrices of the blocks            decay        Muon if `muon`, else AdamW
        embeddings, head                  decay        AdamW (Jordan 2024)
        norms, biases, attention sinks    no decay     AdamW

    Embeddings decay as in GPT-2 and nanoGPT. A fused matrix, such as query, key and value in one,
    is one matrix to Muon. The experts' biases (E, F) and the sinks (G, n_sinks, K) have several
    dimensions but are lists of vectors.

    `rates` has learning rates by module name, one group each; the bigram embedding has that of the
    embedding. A rare token gets a gradient rarely, so an embedding that is to
    be learned in few steps needs a higher rate than matrices, which get one from every token.

    With `head_dim`, the matrices of attention are groups of Muon with "heads": the size of a head.

    Raises:
        UserError: a rate is for a module that the model does not have, or does not train.
    """
    muon_matrices, matrices, vectors = [], [], []
    by_head: dict[str, list[nn.Parameter]] = {"qkv": [], "out": []}
    own: dict[str, list[nn.Parameter]] = {name: [] for name, rate in rates.items() if rate}
    for name, weight in model.named_parameters():
        *path, last = name.split(".")
        if not weight.requires_grad:
            continue
        if weight.ndim < 2 or last.endswith("bias") or last.startswith("sink"):
            vectors.append(weight)
        elif path and (module := path[-1].removeprefix("bigram_")) in own and "blocks" not in path:
            own[module].append(weight)
        elif muon and head_dim and path[-2:-1] == ["attention"] and path[-1] in by_head:
            by_head[path[-1]].append(weight)
        elif muon and "blocks" in path:
            muon_matrices.append(weight)
        else:
            matrices.append(weight)
    groups = [
        {"params": muon_matrices, "weight_decay": weight_decay, "muon": True},
        {"params": matrices, "weight_decay": weight_decay, "muon": False},
        {"params": vectors, "weight_decay": 0.0, "muon": False},
    ]
    # The rows of queries, keys and values are those of their heads; the output's columns are.
    for name, side in (("qkv", "rows"), ("out", "columns")):
        settings = {"weight_decay": weight_decay, "muon": True, "heads": (side, head_dim)}
        groups.append({"params": by_head[name], **settings})
    for name, weights in own.items():
        if not weights:
            problem = f"this model has no {name} of its own that is trained"
            raise UserError(f"training.{name}_lr", problem, "Remove it")
        settings = {"weight_decay": weight_decay, "muon": False, "lr": rates[name]}
        groups.append({"params": weights, **settings})
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


def fused_adamw_update(
    weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> None:
    """`adamw_update` in torch's one kernel, which reads every number once, with the same state."""
    if not state:
        state.update(t=0, m=torch.zeros_like(weight), v=torch.zeros_like(weight))
    beta1, beta2 = group["betas"]
    lists = [weight], [grad], [state["m"]], [state["v"]], []
    t = torch.full((), float(state["t"]), device=weight.device)
    settings = {name: group[name] for name in ("lr", "weight_decay", "eps")}
    torch_adamw(
        *lists, [t], fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2, **settings
    )
    state["t"] += 1


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
    ahead = ahead.to(torch.bfloat16) if ahead.is_cuda else ahead
    if group["heads"] is None:
        update = orthogonalize(ahead, group["rounds"])
    else:
        side, head_dim = group["heads"]
        rows = ahead if side == "rows" else ahead.mT  # (heads · K, D)
        update = orthogonalize(rows.unflatten(0, (-1, head_dim)), group["rounds"]).flatten(0, 1)
        update = update if side == "rows" else update.mT
    rows, columns = weight.shape[-2:]
    scale = math.sqrt(max(1, rows / columns))
    # decay, then the step
    weight.mul_(1 - lr * group["weight_decay"]).sub_(update.to(weight.dtype), alpha=lr * scale)


# Coefficients a, b, c of the quintics p(x) = a x + b x³ + c x⁵, round by round.
# jordan: of the polynomials that settle near 1 it is the steepest at 0 (Jordan 2024): five rounds
# bring singular values from 0.01 up to between 0.68 and 1.14. They do not converge to exactly 1,
# which the update does not need.
# polar_express: each round has the best polynomial for what the rounds before leave (Amsel et al.
# 2025, algorithm 1, from 0.01, with their safety factor of 1.02 and cushion of 0.024): four rounds
# bring the same values to between 0.98 and 1.02, the first three to between 0.69 and 1.29.
POLAR_EXPRESS = (
    (7.8327, -21.4358, 15.1063),
    (3.5821, -2.5766, 0.4872),
    (2.6514, -1.8963, 0.4135),
    (1.9772, -1.3594, 0.3861),
)
ROUNDS = {
    "jordan": ((3.4445, -4.7750, 2.0315),) * 5,
    "polar_express": POLAR_EXPRESS,
    "polar_express_3": POLAR_EXPRESS[:3],
}
# Above 1, polar_express diverges at once: room for the rounding of the norm.
MARGIN = {"jordan": 1.0, "polar_express": 1.01, "polar_express_3": 1.01}
# A matrix of a smaller norm is not scaled up to 1; zero stays zero.
SMALLEST = 1e-7


def orthogonalize(matrix: Tensor, rounds: str = "jordan") -> Tensor:
    """About U Vᵀ where `matrix` is U S Vᵀ: the same singular vectors, all singular values near 1.

    Newton-Schulz iteration. An odd polynomial of a matrix acts on its singular values alone:

        a X + b (X Xᵀ) X + c (X Xᵀ)² X  =  U (a S + b S³ + c S⁵) Vᵀ

    so p can be applied by matrix products, without the slow decomposition. The last two dimensions
    are the matrix, others are a batch. `rounds` is a name in ROUNDS.

    A round multiplies X by P = a I + b G + c G² where G = X Xᵀ, and with it turns G into P G P. So
    the rounds need only G (r, r), and X is multiplied once, by the product of all P. With 5 rounds
    on X (r, c) that is 17 r³ + 2 r² c multiplications in place of 5 r³ + 10 r² c: fewer if
    c > 1.5 r, and the same result up to rounding.
    """
    # Work on the wide form: X Xᵀ is then the smaller of the two products.
    tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if tall else matrix  # (..., r, c) with r <= c
    # In bf16 the rounding of G would grow from round to round.
    if x.size(-1) > 1.5 * x.size(-2) and x.dtype != torch.bfloat16:
        factor = _rounds_on_gram(x, rounds)  # (..., r, r), symmetric: also (factor @ x).mT
        return matrix @ factor if tall else factor @ matrix
    x = _rounds(x, rounds)
    return x.mT if tall else x


def _rounds(x: Tensor, rounds: str) -> Tensor:
    """The polynomials applied to the singular values of x (..., r, c), round by round."""
    # Divide by the Frobenius norm, which is at least the largest singular value: above 1 p
    # diverges.
    x = x / (MARGIN[rounds] * x.norm(dim=(-2, -1), keepdim=True)).clamp(min=SMALLEST)
    for a, b, c in ROUNDS[rounds]:
        gram = symmetric_product(x, x.mT)  # (..., r, r): X Xᵀ
        x = a * x + (b * gram + c * symmetric_product(gram, gram)) @ x  # (..., r, c)
    return x


def _rounds_on_gram(x: Tensor, rounds: str) -> Tensor:
    """The product of all P (..., r, r), divided by the norm of x (..., r, c); all P are polynomials
    of one G, so that their order is free.
    """
    first, *others = ROUNDS[rounds]
    gram = symmetric_product(x, x.mT)  # (..., r, r): X Xᵀ
    # The trace of X Xᵀ is the square of the Frobenius norm: no pass over X is needed for it.
    norm = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None].sqrt()
    norm = (MARGIN[rounds] * norm).clamp(min=SMALLEST)
    gram = gram.div_(norm * norm)
    factor = product = _factor(gram, first)
    for polynomial in others:
        gram = symmetric_product(symmetric_product(factor, gram), factor)
        factor = _factor(gram, polynomial)
        product = symmetric_product(factor, product)
    return product.div(norm)


def _factor(gram: Tensor, polynomial: tuple[float, float, float]) -> Tensor:
    """P = a I + b G + c G² (..., r, r)."""
    a, b, c = polynomial
    factor = symmetric_product(gram, gram).mul_(c).add_(gram, alpha=b)
    factor.diagonal(dim1=-2, dim2=-1).add_(a)
    return factor


# A smaller matrix is multiplied faster as a whole.
LARGE = 256
BLOCKS = 4


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` (..., r, r) where it is symmetric. On a CPU only 10 of 16 blocks are computed
    (of tensors without contents, by which memory is planned, all at once):

    1 1 1 1
    · 2 2 2        1, 2, 3, 4: one product for each row of blocks, from the diagonal on
    · · 3 3        ·: copied from the other side of the diagonal
    · · · 4
    """
    r = left.size(-2)
    if left.is_cuda or r < LARGE or type(left) is not Tensor:
        return left @ right
    result = left.new_empty(*left.shape[:-1], r)
    block = math.ceil(r / BLOCKS)
    for start in range(0, r, block):
        rows = slice(start, start + block)
        torch.matmul(left[..., rows, :], right[..., start:], out=result[..., rows, start:])
        result[..., rows, :start] = result[..., :start, rows].mT
    return result
