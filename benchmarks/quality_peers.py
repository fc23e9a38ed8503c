"""nanochat's and nanoGPT's own model and optimizer, trained as their train programs do on one device.

Their code is imported from a checkout, unmodified; nothing of it is in this project. What their
programs compute from the command line (learning rates, momentum and decay over the steps) is
written here, with the place that it comes from.
"""

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylm.common.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class PeerShape:
    """What a peer has in common with the first config."""

    vocab_size: int
    seq_len: int
    n_layers: int
    d_model: int
    n_heads: int
    max_steps: int
    tokens_per_step: int


@dataclass(frozen=True)
class Peer:
    """A model with its optimizer."""

    model: "torch.nn.Module"
    optimizer: "torch.optim.Optimizer"
    set_step: Callable[[int], None]
    """sets the rates of a step, counted from 0"""
    loss_sum: "Callable[[Tensor, Tensor], Tensor]"
    """of inputs and labels (B, T); labels of -1 are not targets"""
    grad_clip: float | None


def import_from(folder: Path, module: str) -> Any:
    """A module of a checkout."""
    if not (folder / Path(*module.split("."))).with_suffix(".py").exists():
        name = folder.name
        fix = f"Clone https://github.com/karpathy/{name} and give its folder"
        raise UserError(str(folder), f"has no {module.replace('.', '/')}.py", fix)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(folder))


def nanochat(folder: Path, shape: PeerShape, rate_scale: float) -> Peer:
    """nanochat's GPT and MuonAdamW, with the settings of scripts/base_train.py.

    `rate_scale` multiplies all learning rates. base_train.py scales them by the root of the batch,
    relative to 2^19 tokens; its windows need a kernel that a CPU does not have, so it recommends
    the pattern L there.
    """
    import torch

    gpt = import_from(folder, "nanochat.gpt")
    config = gpt.GPTConfig(
        sequence_len=shape.seq_len,
        vocab_size=shape.vocab_size,
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        n_kv_head=shape.n_heads,
        n_embd=shape.d_model,
        window_pattern="L",
    )
    with torch.device("meta"):
        model = gpt.GPT(config)
    model.to_empty(device="cpu")
    model.init_weights()
    # Decay for a batch of this size and a run of 12 tokens per weight of blocks and head, from that
    # of its reference run: depth 12, 2^19 tokens per step.
    with torch.device("meta"):
        reference = gpt.GPT(gpt.GPTConfig(vocab_size=shape.vocab_size))
    weights, reference_weights = (
        sizes["transformer_matrices"] + sizes["lm_head"]
        for sizes in (model.num_scaling_params(), reference.num_scaling_params())
    )
    decay = 0.28 * math.sqrt(shape.tokens_per_step / 2**19) * reference_weights / weights
    optimizer = model.setup_optimizer(
        unembedding_lr=0.008 * rate_scale,
        embedding_lr=0.3 * rate_scale,
        scalar_lr=0.5 * rate_scale,
        matrix_lr=0.02 * rate_scale,
        weight_decay=decay,
    )
    return Peer(
        model,
        optimizer,
        lambda step: set_nanochat_step(optimizer, step, shape.max_steps, decay),
        lambda inputs, labels: model(inputs, labels, loss_reduction="sum"),
        grad_clip=None,
    )


def set_nanochat_step(
    optimizer: "torch.optim.Optimizer", step: int, max_steps: int, decay: float
) -> None:
    """Rates, momentum and decay of scripts/base_train.py; its 40 warmup steps are at most a tenth
    of a run here.
    """
    warmup, cooldown = min(40, max_steps // 10), round(0.65 * max_steps)
    left = (max_steps - step) / cooldown  # 1 at the start of the cool-down
    rate = min((step + 1) / max(warmup, 1), 1.0)
    if left < 1:
        rate = left + (1 - left) * 0.05
    momentum = 0.97 * left + 0.90 * (1 - left) if left < 1 else min(0.85 + 0.12 * step / 400, 0.97)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * rate
        if group["kind"] == "muon":
            group["momentum"] = momentum
            group["weight_decay"] = decay * 0.5 * (1 + math.cos(math.pi * step / max_steps))


def nanogpt(folder: Path, shape: PeerShape, rate_scale: float) -> Peer:
    """nanoGPT's GPT and AdamW, with the settings of config/train_shakespeare_char.py, its config
    for small models, and without dropout.
    """
    module = import_from(folder, "model")
    model = module.GPT(
        module.GPTConfig(
            block_size=shape.seq_len,
            vocab_size=shape.vocab_size,
            n_layer=shape.n_layers,
            n_head=shape.n_heads,
            n_embd=shape.d_model,
            dropout=0.0,
            bias=False,
        )
    )
    peak, warmup = 1e-3 * rate_scale, min(100, shape.max_steps // 10)
    optimizer = model.configure_optimizers(0.1, peak, (0.9, 0.99), "cpu")

    def set_step(step: int) -> None:
        done = (step - warmup) / (shape.max_steps - warmup)
        lowest = 0.1 * peak
        rate = lowest + 0.5 * (1 + math.cos(math.pi * done)) * (peak - lowest)
        for group in optimizer.param_groups:
            group["lr"] = peak * (step + 1) / (warmup + 1) if step < warmup else rate

    def loss_sum(inputs: "Tensor", labels: "Tensor") -> "Tensor":
        return model(inputs, labels)[1] * (labels >= 0).sum()

    return Peer(model, optimizer, set_step, loss_sum, grad_clip=1.0)


PEERS: dict[str, Callable[[Path, PeerShape, float], Peer]] = {
    "nanochat": nanochat,
    "nanogpt": nanogpt,
}
