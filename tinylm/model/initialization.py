"""The weights of a new model: one table, and the functions that draw them.

    weights            normal (GPT-2)  trunc_normal        zero_outputs
    linear layers      N(0, 0.02²)     N(0, 2/(in + out))  N(0, 1/in)
    attention's out,   N(0, 0.02²)     N(0, 2/(in + out))  0
    feed-forward down
    embedding          N(0, 0.02²)     N(0, 1)             N(0, 1)
    embedding if tied  N(0, 0.02²)     N(0, 1/D)           N(0, 0.02²)
    head               N(0, 0.02²)     N(0, 2/(in + out))  N(0, 0.001²)
    norms, biases      1, 0            1, 0                1, 0
    stream scalars     1               1                   1
    input scalars      from 0.2 in the first block to 0.05 in the last (Karpathy 2025, nanochat)
    bigram embedding   0               0                   0
    sink keys, values  N(0, 0.02²)     N(0, 0.02²)         N(0, 0.02²)    at first all look alike

trunc_normal: activations and gradients keep their size from layer to layer (Glorot and Bengio
2010), in a residual stream of size 1. A tied embedding is also the head: with std 1, logits of
size √D and a first loss far above ln V. zero_outputs: every block adds nothing at first, so that
the model starts as a shallow one and the first gradients of all layers have the same size (Zhang
et al. 2019, "Fixup"; Yang et al. 2022, appendix D.2); a small head gives a first loss of ln V.
trunc_normal is cut at 3 standard deviations, which avoids the rare large weight. 0.02 is GPT-2's
constant (Radford et al. 2019), close to √(2/(in + out)) of its 768 × 3072 layers. Layers that are
stored as one matrix (q, k and v; gate and value) are drawn one by one, each with its own in and
out. GPT-2's extra 1/√(2 n_layers) on the output projections is not applied. Learned positions are
drawn like the embedding.
"""

# in, out: columns and rows of a matrix · D model width · F feed-forward width
# H query heads · G key/value heads · K head width

import math

import torch
from torch import Tensor, nn

from tinylm.config.model import GATED, ModelConfig


@torch.no_grad()
def init_weights(model: nn.Module) -> None:
    """Draw the weights as in the table, module by module, from torch's global generator."""
    config = model.config
    for name, weight in model.named_parameters():  # a tied matrix comes once, as the embedding
        if name.endswith("bias") or name == "bigram_embedding.weight":
            nn.init.zeros_(weight)
        elif name == "input_scalars":
            weight.copy_(torch.linspace(0.2, 0.05, len(weight)))
        elif name.endswith(("norm.weight", "stream_scalars")):
            nn.init.ones_(weight)
        elif config.init == "normal" or ".sink_" in name:
            nn.init.normal_(weight, std=0.02)
        elif config.init == "zero_outputs":
            init_zero_outputs(name, weight, config)
        elif name in ("embedding.weight", "positions.weight"):
            std = config.d_model**-0.5 if config.tie_embeddings else 1.0
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
        else:
            for matrix in _separate_matrices(name, weight, config):
                std = math.sqrt(2 / (matrix.size(-1) + matrix.size(-2)))
                nn.init.trunc_normal_(matrix, std=std, a=-3 * std, b=3 * std)


def init_zero_outputs(name: str, weight: Tensor, config: ModelConfig) -> None:
    """One weight as in the column zero_outputs."""
    if name.endswith(("attention.out.weight", ".ffn.down.weight", ".ffn.down")):
        std = 0.0
    elif name in ("embedding.weight", "positions.weight"):
        std = 0.02 if config.tie_embeddings else 1.0
    elif name == "head.weight":
        std = 0.001
    else:
        std = weight.size(-1) ** -0.5
    nn.init.normal_(weight, std=std)


def _separate_matrices(name: str, weight: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
    """Views of the layers that are stored as one matrix: queries, keys, values; gate and value."""
    if name.endswith("qkv.weight"):
        H, G, K = config.n_heads, config.n_kv_heads, config.head_dim
        return weight.split((H * K, G * K, G * K))
    if ".ffn.up" in name and config.ffn in GATED:
        return weight.chunk(2, dim=-2)
    return (weight,)
