"""One decode step of a `Decoder`, written for speed: one new token per row, no gradients.

decoder.py is the text to read; this file computes the same logits from the same weights and cache,
and a test holds both equal for every option of the decoder. What it does differently:

    decoder.py                                  here
    angles, cosines, sines of each step         one table of all positions
    q and k rotated by an autograd function     q and k rotated together, in place
    x Wᵀ with W stored (out, in)                x W with W stored (in, out): read in order
    keys and values repeated for their queries  the queries of one head are read as its rows
    modules                                     functions, looked up once

In bf16 the matrices are packed for oneDNN, which reads 2 bytes a weight at the speed of 4; a plain
bf16 product of one row is slower than fp32. The weights must not change after construction. Only for
the CPU: a GPU needs fewer launches, not another layout.
"""

# B rows · D model width · H query heads · G key/value heads · R = H/G · K head width · S keys
# F feed-forward width · V vocabulary · E experts · A experts per token

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.model.decoder import (
    Attention,
    Block,
    Decoder,
    MixtureOfExperts,
    activate,
    attention_context,
    rotary_cos_sin,
)
from tinylm.model.kv_cache import KVCache

Function = Callable[[Tensor], Tensor]


class LeanStep:
    """`step(ids, cache)` is `model.head(model.features(ids[:, None], cache=cache).hidden[:, -1])`."""

    def __init__(self, model: Decoder):
        self.config = config = model.config
        self.embedding = model.embedding.weight
        self.positions = model.positions.weight if config.position == "learned" else None
        self.rotation: tuple[Tensor, Tensor] | None = None
        if config.position == "rope":
            self.rotation = rotation_table(config.max_seq_len, config.head_dim, config.rope_theta)
        # The table replaces the angles that a context would compute; its mask is the same.
        self.mask_config = config.model_copy(
            update={"position": "alibi" if config.position == "alibi" else "none"}
        )
        self.layers = [LeanBlock(block) for block in model.blocks]
        self.norm = norm_function(model.norm)
        self.head = linear_function(model.head)

    @torch.inference_mode()
    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) of the token after `ids` (B,), which are added to `cache`."""
        positions = cache.advance(1)  # (1,), or (B, 1) if rows differ
        context = attention_context(self.mask_config, positions, cache)
        x = self.embedding[ids]  # (B, D)
        if self.positions is not None:
            x = x + self.positions[positions.squeeze(-1)]  # (B, D)
        cos_sin = None
        if self.rotation is not None:
            cos, sin = self.rotation
            cos_sin = cos[positions], sin[positions]  # (1, K), or (B, 1, K)
        mask = context.attention_mask
        for layer in self.layers:
            x = layer(x, cos_sin, positions, mask, cache)  # (B, D)
        return self.head(self.norm(x))  # (B, V)


class LeanBlock:
    """Attention and feed-forward of one layer, each added to the residual stream."""

    def __init__(self, block: Block):
        self.post = block.placement == "post"
        self.attention_norm = norm_function(block.attention_norm)
        self.ffn_norm = norm_function(block.ffn_norm)
        self.attention = LeanAttention(block.attention)
        self.ffn = ffn_function(block.ffn)

    def __call__(
        self,
        x: Tensor,
        cos_sin: tuple[Tensor, Tensor] | None,
        positions: Tensor,
        mask: Tensor | None,
        cache: KVCache,
    ) -> Tensor:
        """The residual stream (B, D) after this block."""
        if self.post:
            x = self.attention_norm(x + self.attention(x, cos_sin, positions, mask, cache))
            return self.ffn_norm(x + self.ffn(x))
        x = x + self.attention(self.attention_norm(x), cos_sin, positions, mask, cache)
        return x + self.ffn(self.ffn_norm(x))


class LeanAttention:
    """Attention of one new token per row over the cache."""

    def __init__(self, attention: Attention):
        self.layer = attention.layer
        self.n_heads, self.n_kv_heads = attention.n_heads, attention.n_kv_heads
        self.head_dim, self.n_sinks = attention.head_dim, attention.n_sinks
        self.qkv, self.out = linear_function(attention.qkv), linear_function(attention.out)
        self.qk_norm_weight: Tensor | None = None
        if isinstance(attention.q_norm, nn.RMSNorm):
            H, G, K = self.n_heads, self.n_kv_heads, self.head_dim
            weights = attention.q_norm.weight.expand(H, K), attention.k_norm.weight.expand(G, K)
            self.qk_norm_weight = torch.cat(weights)  # (H + G, K)
            self.qk_norm_eps = attention.q_norm.eps
        if self.n_sinks:
            self.sinks = attention.sink_keys, attention.sink_values  # (G, n_sinks, K) each

    def __call__(
        self,
        x: Tensor,
        cos_sin: tuple[Tensor, Tensor] | None,
        positions: Tensor,
        mask: Tensor | None,
        cache: KVCache,
    ) -> Tensor:
        """Mix what the new tokens x (B, D) see."""
        B, H, G, K = len(x), self.n_heads, self.n_kv_heads, self.head_dim
        # One product for all heads: H of queries, G of keys, G of values.
        heads = self.qkv(x).view(B, H + 2 * G, K)
        qk, v = heads[:, : H + G], heads[:, H + G :]  # (B, H + G, K), (B, G, K)
        # Queries and keys are normalized and rotated together.
        if self.qk_norm_weight is not None:
            qk = F.rms_norm(qk, (K,), None, self.qk_norm_eps) * self.qk_norm_weight
        if cos_sin is not None:
            qk = rotate(qk, *cos_sin)  # (B, H + G, K)
        q, k = qk[:, :H], qk[:, H:]  # (B, H, K), (B, G, K)
        # Store the new keys and values, and look at all that are stored.
        keys, values = cache.write(self.layer, positions, k[:, :, None], v[:, :, None])
        if self.n_sinks:
            sink_keys, sink_values = self.sinks
            keys = torch.cat((sink_keys.to(keys.dtype).expand(B, -1, -1, -1), keys), dim=2)
            values = torch.cat((sink_values.to(values.dtype).expand(B, -1, -1, -1), values), dim=2)
        mixed = self.attend(q.to(values.dtype), keys, values, mask)  # (B, H·K)
        return self.out(mixed)  # (B, D)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(q kᵀ / √K + mask) v: q (B, H, K), keys and values (B, G, S, K); (B, H·K)."""
        B, G, H, K = len(q), self.n_kv_heads, self.n_heads, self.head_dim
        # The R queries that share a head are R rows of one product: nothing is repeated.
        rows = q.reshape(B, G, H // G, K)  # (B, G, R, K)
        if mask is not None:
            if mask.dim() == 4 and mask.size(1) == H:  # a bias per query head: (., H, 1, S)
                mask = mask.reshape(len(mask), G, H // G, -1)
            elif mask.dim() == 3 and mask.size(0) == H:  # (H, 1, S)
                mask = mask.reshape(1, G, H // G, -1)
            if mask.dtype != torch.bool:
                mask = mask.to(values.dtype)
        return F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask).reshape(B, H * K)


# --- rotation -------------------------------------------------------------------------------------


def rotation_table(n_positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines, and sines with the sign of each half, of all positions: (n_positions, K) each.

    >>> cos, sin = rotation_table(2, 2, 10000.0)
    >>> rotate(torch.tensor([3.0, 4.0]), cos[1], sin[1])   # by 1 radian
    tensor([-1.7450,  4.6856])
    """
    cos, sin = rotary_cos_sin(torch.arange(n_positions), head_dim, theta)
    half = head_dim // 2
    return cos, torch.cat((-sin[:, :half], sin[:, half:]), dim=-1)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """x (..., K) rotated: (a, b) · cos + (b, a) · (-sin, sin), in fp32 as in decoder.py."""
    wide = x.to(cos.dtype)
    swapped = wide.roll(x.size(-1) // 2, -1)  # (b, a)
    return swapped.mul_(signed_sin).addcmul_(wide, cos).to(x.dtype)


# --- functions of modules -------------------------------------------------------------------------


def norm_function(norm: nn.Module) -> Function:
    """The norm as a function of (..., D)."""
    if isinstance(norm, nn.RMSNorm):
        shape, weight, eps = tuple(norm.normalized_shape), norm.weight, norm.eps
        return lambda x: F.rms_norm(x, shape, weight, eps)
    if isinstance(norm, nn.LayerNorm):
        shape = tuple(norm.normalized_shape)
        return lambda x: F.layer_norm(x, shape, norm.weight, norm.bias, norm.eps)
    assert isinstance(norm, nn.Identity), norm
    return lambda x: x


def linear_function(linear: nn.Linear) -> Function:
    """The layer as a function of (B, in), its matrix laid out for reading."""
    return matrix_function(linear.weight.detach(), linear.bias)


def matrix_function(weight: Tensor, bias: Tensor | None) -> Function:
    """x Wᵀ + bias for a matrix W (out, in)."""
    if weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        product = torch.ops.mkldnn._linear_pointwise
        return lambda x: product(x, packed, bias, "none", [], "")
    by_column = weight.T.contiguous()  # (in, out)
    if bias is not None:
        return lambda x: torch.addmm(bias, x, by_column)
    return lambda x: torch.mm(x, by_column)


def ffn_function(ffn: nn.Module) -> Function:
    """The feed-forward layer as a function of (B, D)."""
    if isinstance(ffn, MixtureOfExperts):
        return LeanExperts(ffn)
    up, down, kind = linear_function(ffn.up), linear_function(ffn.down), ffn.kind
    return lambda x: down(activate(kind, up(x)))


class LeanExperts:
    """A mixture of experts: each visited expert reads its rows once."""

    def __init__(self, mixture: MixtureOfExperts):
        self.top_k, self.kind = mixture.top_k, mixture.kind
        self.router = linear_function(mixture.router)
        self.experts: list[tuple[Function, Function]] = []
        for expert in range(mixture.n_experts):
            up_bias = None if mixture.up_bias is None else mixture.up_bias[expert]
            down_bias = None if mixture.down_bias is None else mixture.down_bias[expert]
            up = matrix_function(mixture.up[expert].detach(), up_bias)
            down = matrix_function(mixture.down[expert].detach(), down_bias)
            self.experts.append((up, down))

    def __call__(self, x: Tensor) -> Tensor:
        """The output (B, D)."""
        probabilities = self.router(x).float().softmax(dim=-1)  # (B, E)
        weights, experts = probabilities.topk(self.top_k, dim=-1)  # (B, A) each
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        mixed = torch.zeros_like(x)
        for expert in experts.unique().tolist():
            rows, choice = (experts == expert).nonzero(as_tuple=True)
            up, down = self.experts[expert]
            output = down(activate(self.kind, up(x[rows])))  # (n, D)
            mixed.index_add_(0, rows, output * weights[rows, choice, None])
        return mixed
