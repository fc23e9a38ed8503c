"""The model: a decoder-only Transformer that predicts the next token. Read this file first.

    token ids ─▶ embedding ─▶ n_layers × [ attention ─▶ feed-forward ] ─▶ norm ─▶ head ─▶ logits
     (B, T)      (B, T, D)              (B, T, D)                        (B, T, D)       (B, T, V)

Notable features, each one a field of `ModelConfig`:

- rotary (also scaled), learned, ALiBi or no positions   - sliding windows (in all layers or some)
- multi-head, grouped-query and multi-query attention    - learned attention sinks
- SwiGLU, GeGLU, SiLU, GELU, squared-ReLU feed-forward   - packed documents that do not see each other
- RMSNorm or LayerNorm, in four placements or none       - mixture of experts without dropped tokens
- QK norm, per head or over all heads                    - tied or untied embedding and head
- learned scalars of stream and embedding, per layer     - hashed embedding of pairs of tokens

In reading order: norms · pairs of tokens · rotary and ALiBi positions · which keys a query sees
(the mask) · attention · feed-forward · block · decoder · sizes and FLOPs. One forward pass serves training,
prefill and decoding; the only difference is whether it is given a `KVCache` (kv_cache.py).
New weights are drawn in initialization.py.

This file knows nothing of text, tokenizers, losses, optimizers or training loops.
"""


# B batch · T query positions · S key positions · D model width · H query heads · G key/value heads
# K head width · F feed-forward width · V vocabulary
# E experts · A experts per token · N tokens = B·T

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# kv_cache is imported when a cache is made, rope_scaling for a scaled context: training needs none
from tinylm import model as models
from tinylm.config.model import GATED, ModelConfig, MoEConfig, RopeScalingConfig
from tinylm.model.initialization import init_weights

if TYPE_CHECKING:
    from tinylm.model.kv_cache import KVCache


class Features(NamedTuple):
    """Hidden states (B, T, D) after the last norm, and the balance loss of the experts
    (0 without any).
    """

    hidden: Tensor
    balance_loss: Tensor


# --- norms ----------------------------------------------------------------------------------------


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """RMSNorm, x / √(mean(x²) + ε) · w, or LayerNorm, over the last dimension."""
    if config.norm == "layernorm":
        return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias == "all")
    return nn.RMSNorm(width, eps=config.norm_eps)


def make_qk_norm(config: ModelConfig, n_heads: int) -> nn.Module:
    """The norm of queries or keys (B, n_heads, T, K)."""
    if config.qk_norm == "all_heads":
        return AllHeadsNorm(n_heads * config.head_dim, eps=config.norm_eps)
    return nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()


class AllHeadsNorm(nn.RMSNorm):
    """RMSNorm of x (B, heads, T, K) over the heads of a token together (OLMo 2, 2025)."""

    def forward(self, x: Tensor) -> Tensor:
        joined = super().forward(x.transpose(1, 2).flatten(2))  # (B, T, heads · K)
        return joined.unflatten(2, (-1, x.size(-1))).transpose(1, 2)  # (B, heads, T, K)


# --- pairs of tokens ------------------------------------------------------------------------------


def bigram_hash(before: Tensor, ids: Tensor, n_rows: int) -> Tensor:
    """The row of the bigram embedding for each token (B, T) with the one before it, which is -1 at
    the start of a text. Two pairs may share a row.

    The first layer already knows the previous token, for the cost of a lookup (Huang et al. 2025,
    "Over-Tokenized Transformer").

    >>> bigram_hash(torch.tensor([[-1, 5, 7]]), torch.tensor([[5, 7, 5]]), 1000).tolist()
    [[452, 539, 713]]
    """
    # Odd factors, so that all bits depend on the ids; in 64 bits, where none of them is lost.
    mixed = (before.long() + 1) * 2654435761 ^ ids.long() * 805459861
    return (mixed ^ mixed >> 17) % n_rows


# --- positions: rotary and ALiBi ------------------------------------------------------------------
#
# Attention by itself sees a set of tokens, not a sequence. Rotary embeddings (RoPE; Su et al. 2021)
# rotate each query and key by an angle proportional to its position, pair by pair of dimensions:
#
#     pair i = dimensions (i, i + K/2)        angle at position p = p · theta^(-2i/K)
#     pair 0 turns once per 2π positions, the last pair about once per 2π · theta
#
# The dot product of a query at p and a key at s then depends on p - s alone, which is why no
# position is added to the residual stream. Pairing i with i + K/2 is the half-split layout of Llama
# and Hugging Face; the paper pairs neighbors (2i, 2i + 1). The two layouts must not be mixed:
# weights trained with one are wrong under the other.


def rotary_cos_sin(
    positions: Tensor,
    head_dim: int,
    theta: float,
    scaling: RopeScalingConfig | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (..., K), of the rotation at positions (...,)
    (Su et al. 2021, eq. 34); in a scaled context those of rope_scaling.py, where `lengths`
    (...,) is explained.
    """
    # fp32: in bf16, neighboring positions beyond 256 would get the same angle.
    # exp, not a power: compiled on the CPU, a power would be recomputed in each layer.
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)  # (K/2,)
    frequencies = torch.exp(pairs * (-math.log(theta) / head_dim))  # (K/2,)
    if scaling is not None:
        scaled = models.rope_scaling.scaled_frequencies
        frequencies = scaled(frequencies, theta, scaling, lengths)  # (K/2,) or (..., K/2)
    angles = positions[..., None].float() * frequencies  # (..., K/2)
    angles = torch.cat((angles, angles), dim=-1)  # (..., K): both halves of a pair, same angle
    if scaling is None:
        return angles.cos(), angles.sin()
    factor = models.rope_scaling.attention_factor(scaling)
    return angles.cos() * factor, angles.sin() * factor


class Rotary(torch.autograd.Function):
    """Rotate x (B, heads, T, K) by cos and sin (T, K); the result has the dtype of x.

    Each pair (a, b) becomes (a cos - b sin, b cos + a sin). Written as an autograd function because
    the gradient of a rotation is the rotation back, by the negative angle: half the passes over
    memory that autograd would need.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        wide = x.to(torch.promote_types(x.dtype, cos.dtype))  # rotate in fp32, also under bf16
        a, b = wide.chunk(2, dim=-1)  # (B, heads, T, K/2) each
        # (-b, a) · sin + (a, b) · cos
        return torch.cat((-b, a), dim=-1).mul_(sin).addcmul_(wide, cos).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # On the CPU, attention returns the gradient of the keys transposed; every pass over that
        # layout is slow.
        rows = grad if grad.stride(-1) == 1 else grad.contiguous()
        return Rotary.apply(rows, cos, -sin), None, None


apply_rotary = Rotary.apply  # apply_rotary(x, cos, sin)


def alibi_slopes(n_heads: int) -> Tensor:
    """The slope (H,) of each head: a geometric sequence that starts at 2^(-8/H).

    ALiBi (Press et al. 2021, section 3) subtracts slope · distance from each attention score, so
    that far keys weigh less. If the number of heads is not a power of two: the slopes for the next
    lower power of two, then every other slope for the next higher one.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2 ** (-4 * (2 * i + 1) / power) for i in range(n_heads - power)]
    return torch.tensor(slopes + between)


# --- which keys a query sees ----------------------------------------------------------------------
#
#     causal            window 2           two documents      2 sinks, window 2
#     x · · · ·         x · · · ·          x · · · ·          s s  x · · · ·
#     x x · · ·         x x · · ·          x x · · ·          s s  x x · · ·
#     x x x · ·         · x x · ·          · · x · ·          s s  · x x · ·        row: query
#     x x x x ·         · · x x ·          · · x x ·          s s  · · x x ·        column: key
#     x x x x x         · · · x x          · · x x x          s s  · · · x x


@dataclass(frozen=True)
class AttentionContext:
    """Positions and mask of one forward pass: computed once, shared by all layers of a kind."""

    positions: Tensor
    """(T,) of the new tokens, or (B, T) if rows differ: packed documents, texts of a batch"""
    cos_sin: tuple[Tensor, Tensor] | None
    """of the rotary embedding, (T, K) or (B, 1, T, K); None for other positions"""
    attention_mask: Tensor | None
    """boolean (True: seen), or with ALiBi an additive bias; broadcasts to (B, H, T, n_sinks + S)"""
    is_causal: bool
    """whether the kernel applies the plain causal mask itself"""
    cache: KVCache | None
    document_lengths: list[list[int]] | None = None
    """of each packed row, if attention takes document by document and needs no mask"""


def layer_kinds(config: ModelConfig) -> tuple[list[ModelConfig], list[int]]:
    """The kinds of layers, each as the settings of a model that has no other, and the kind of
    each layer: all alike, or some with a window (kind 0) and every n-th without (kind 1).

    Local layers read the neighborhood cheaply, a few global ones the rest (Gemma 3, 2025).
    """
    every = config.full_attention_interval
    if every is None:
        return [config], [0] * config.n_layers
    alike = {"full_attention_interval": None, "rope_local_theta": None}
    local, full = dict(alike), alike | {"sliding_window": None}
    if config.rope_local_theta is not None:
        local |= {"rope_theta": config.rope_local_theta, "rope_scaling": None}
    kinds = [config.model_copy(update=local), config.model_copy(update=full)]
    return kinds, [int((layer + 1) % every == 0) for layer in range(config.n_layers)]


def attention_context(
    config: ModelConfig, positions: Tensor, cache: KVCache | None = None
) -> AttentionContext:
    """The context of new tokens at `positions` (T,) or (B, T),
    which also attend to what `cache` holds.
    """
    # Rotation angles of the new tokens. Cached keys were rotated when they were written.
    cos_sin = None
    if config.position == "rope":
        scaling, lengths = config.rope_scaling, None
        if scaling is not None and scaling.type == "dynamic":
            lengths = models.rope_scaling.text_lengths(positions)  # ([B,] T)
        cos, sin = rotary_cos_sin(
            positions, config.head_dim, config.rope_theta, scaling, lengths
        )  # ([B,] T, K)
        cos_sin = (cos[:, None], sin[:, None]) if positions.dim() == 2 else (cos, sin)
    # The attention kernels are fastest without a mask. Two cases need none: plain causal attention
    # over a whole sequence (is_causal), and a single new token that sees everything in the cache.
    keys = positions if cache is None else cache.key_positions  # ([B,] S)
    T, S, window = positions.size(-1), keys.size(-1), config.sliding_window
    masked = (
        config.position == "alibi"
        or config.n_sinks > 0
        or positions.dim() == 2  # packed documents, or rows of different lengths
        or (window is not None and window < S)
        or (S != T and T > 1)  # several new tokens after cached ones
    )
    if cache is None and positions.dim() == 2 and can_split_documents(config, positions):
        lengths = document_lengths(positions)
        return AttentionContext(positions, cos_sin, None, True, None, lengths)
    if masked:
        mask = attention_mask(config, positions, keys, is_packed=cache is None)
        return AttentionContext(positions, cos_sin, mask, is_causal=False, cache=cache)
    return AttentionContext(positions, cos_sin, None, is_causal=S == T, cache=cache)


def attention_mask(
    config: ModelConfig, queries: Tensor, keys: Tensor, *, is_packed: bool = False
) -> Tensor:
    """The mask or bias (..., T, n_sinks + S) for queries at (..., T) and keys at positions
    (..., S).

    Positions that differ by row are those of packed documents if `is_packed`.
    """
    mask = causal_mask(queries, keys, config.sliding_window)  # ([B,] T, S)
    distance = queries[..., :, None] - keys[..., None, :]  # ([B,] T, S)
    if queries.dim() == 2:
        if is_packed:
            # Index in the row minus position is where the token's document starts.
            starts = torch.arange(queries.size(1), device=queries.device) - queries  # (B, T)
            mask = mask & (starts[:, :, None] == starts[:, None, :])  # (B, T, S)
        mask, distance = mask[:, None], distance[:, None]  # (B, 1, T, S)
    if config.position == "alibi":
        slopes = alibi_slopes(config.n_heads).to(distance.device)[:, None, None]  # (H, 1, 1)
        mask = (-slopes * distance).masked_fill(~mask, -math.inf)  # ([B,] H, T, S)
    if config.n_sinks:
        # Sinks come first; every query sees them, without a bias.
        seen = True if mask.dtype == torch.bool else 0.0
        mask = F.pad(mask, (config.n_sinks, 0), value=seen)  # (..., T, n_sinks + S)
    return mask


def causal_mask(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys each query sees: positions (..., T) and (..., S) give booleans (..., T, S).

    A token sees itself and the tokens before it; with a window W, the last W positions, itself
    included.

    >>> causal_mask(torch.arange(4), torch.arange(4), 2).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    distance = queries[..., :, None] - keys[..., None, :]  # (..., T, S)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """Positions (B, T) that restart at 0 in each document; equal neighboring ids are one document.

    >>> positions_in_documents(torch.tensor([[5, 5, 5, 6, 6]])).tolist()
    [[0, 1, 2, 0, 1]]
    """
    index = torch.arange(document_ids.size(1), device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)  # (B, T): where a document starts
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    # The running maximum of the start indices is the start of each token's own document.
    return index - torch.where(starts, index, 0).cummax(dim=1).values


# Documents of fewer tokens than this, on average, are faster with a mask (docs/LOG.md).
SHORT_DOCUMENTS = 16


def can_split_documents(config: ModelConfig, positions: Tensor) -> bool:
    """Whether attention takes packed documents one after another: no scores between documents are
    computed, which pays on a CPU unless they are very short. Many small calls would be slow on a
    GPU, a graph that is compiled or traced has fixed shapes, a bias or a window needs a mask inside
    the document too, and dropout would draw other random numbers than with a mask.
    """
    return (
        positions.device.type == "cpu"
        and type(positions) is Tensor  # a traced tensor has no values to read
        and not torch.compiler.is_compiling()
        and config.position != "alibi"
        and config.n_sinks == 0
        and config.sliding_window is None
        and config.attention_dropout == 0
        and positions.numel() >= SHORT_DOCUMENTS * int((positions == 0).sum())
    )


def document_lengths(positions: Tensor) -> list[list[int]]:
    """The lengths of the documents in each row of positions (B, T), which restart at 0.

    >>> document_lengths(torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]))
    [[3, 2], [1, 4]]
    """
    end = torch.tensor([positions.size(1)])
    return [(row == 0).nonzero().flatten().diff(append=end).tolist() for row in positions]


# --- attention ------------------------------------------------------------------------------------
#
# Heads, here H = 4 query heads (q) and G key/value heads (k, v) under them:
#
#     MHA  G = H               GQA  1 < G < H           MQA  G = 1
#     q0   q1   q2   q3        q0   q1   q2   q3        q0   q1   q2   q3
#     │    │    │    │          └─┬──┘    └─┬──┘         └────┴─┬──┴────┘
#     kv0  kv1  kv2  kv3         kv0       kv1                 kv0
#
# Query head h uses key/value head h // (H / G). The cache shrinks from H to G heads per layer.


class Attention(nn.Module):
    """Causal self-attention: softmax(q kᵀ / √K) v, H query heads sharing G key/value heads.

    Vaswani et al. 2017, equation 1; shared heads: Shazeer 2019 (MQA), Ainslie et al. 2023 (GQA).
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads
        self.head_dim = config.head_dim
        self.scale = 1 / math.sqrt(config.query_scalar)  # query_scalar is K, unless it is given
        self.n_sinks = config.n_sinks
        self.dropout = config.attention_dropout
        every = config.no_rope_interval
        self.rotates = every is None or (layer + 1) % every != 0
        # Queries, keys and values are one matrix: one large product is faster than three.
        H, G, K = self.n_heads, self.n_kv_heads, self.head_dim
        self.qkv = nn.Linear(config.d_model, (H + 2 * G) * K, bias=config.bias != "none")
        self.out = nn.Linear(H * K, config.d_model, bias=config.bias == "all")
        # Normalized queries and keys bound the scores, which otherwise can grow until the softmax
        # saturates.
        self.q_norm, self.k_norm = make_qk_norm(config, H), make_qk_norm(config, G)
        # Sinks are learned keys and values that every query sees, so that a head with nothing to
        # look for can put its weight there (Xiao et al. 2023).
        if self.n_sinks:
            self.sink_keys = nn.Parameter(torch.empty(G, self.n_sinks, K))
            self.sink_values = nn.Parameter(torch.empty(G, self.n_sinks, K))

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Mix the positions of x (B, T, D); S is what the new tokens may look at,
        the cache included.
        """
        B, T, _ = x.shape
        q, k, v = self.project(x, context)  # (B, H, T, K), (B, G, n_sinks + S, K) twice
        mask = context.attention_mask  # None, or broadcasts to (B, H, T, n_sinks + S)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(v.dtype)  # the kernels want a bias in the dtype of the values
        lengths = None if context.cache is None else context.cache.row_lengths
        if context.document_lengths is not None:
            mixed = self.attend_documents(q, k, v, context.document_lengths)  # (B, H, T, K)
        elif lengths is None or mask is None:
            mixed = self.attend(q, k, v, mask, context.is_causal)  # (B, H, T, K)
        else:
            # Rows of a batch, each with as many keys as it has.
            rows = []
            for row, length in enumerate(lengths):
                one, seen = slice(row, row + 1), slice(self.n_sinks + length)
                row_mask = (mask if len(mask) == 1 else mask[one])[..., seen]  # (1, 1|H, T, seen)
                rows.append(self.attend(q[one], k[one, :, seen], v[one, :, seen], row_mask, False))
            mixed = torch.cat(rows)  # (B, H, T, K)
        # Put the heads side by side again and mix them.
        return self.out(mixed.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)

    def attend_documents(self, q: Tensor, k: Tensor, v: Tensor, lengths: list[list[int]]) -> Tensor:
        """Causal attention (B, H, T, K) within each document of each row."""
        rows = []
        # split, as the gradient of a slice would be as large as all rows
        for *heads, row_lengths in zip(q.split(1), k.split(1), v.split(1), lengths, strict=True):
            documents = zip(*(x.split(row_lengths, dim=2) for x in heads), strict=True)
            rows.append(torch.cat([self.attend(*x, None, True) for x in documents], dim=2))
        return torch.cat(rows)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """softmax(scale · q kᵀ + mask) v (B, H, T, K), fused, so that the (T, S) scores are never
        stored.
        """
        return F.scaled_dot_product_attention(
            q.to(v.dtype),
            k.to(v.dtype),
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=self.scale,
            enable_gqa=self.n_kv_heads != self.n_heads,
        )

    def project(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, K) of the new tokens; keys and values
        (B, G, n_sinks + S, K) they may look at.
        """
        B, T, _ = x.shape
        H, G, K = self.n_heads, self.n_kv_heads, self.head_dim
        # One product for all heads, then cut: H heads of queries, G of keys, G of values.
        heads = self.qkv(x).view(B, T, H + 2 * G, K).transpose(1, 2)  # (B, H + 2G, T, K)
        q, k, v = heads.split((H, G, G), dim=1)  # (B, H, T, K), (B, G, T, K), (B, G, T, K)
        q, k = self.q_norm(q), self.k_norm(k)
        # Rotate queries and keys by their positions. Values carry content and are not rotated.
        if context.cos_sin is not None and self.rotates:
            q = apply_rotary(q, *context.cos_sin)  # (B, H, T, K)
            k = apply_rotary(k, *context.cos_sin)  # (B, G, T, K)
        # With a cache: store the new keys and values, and look at all that are stored.
        if context.cache is not None:
            k, v = context.cache.write(self.layer, context.positions, k, v)  # (B, G, S, K)
        # Sinks come first, neither rotated nor biased: at position 0 for RoPE, 0 away for ALiBi.
        if self.n_sinks:
            k = torch.cat((self.sink_keys.to(k.dtype).expand(B, -1, -1, -1), k), dim=2)
            v = torch.cat((self.sink_values.to(v.dtype).expand(B, -1, -1, -1), v), dim=2)
        return q, k, v

    def weights(self, x: Tensor, context: AttentionContext) -> Tensor:
        """The attention weights (B, H, T, n_sinks + S), for plots:
        the fused kernel never stores them.

        softmax(scale · q kᵀ) in fp32; only without a cache and without packed documents.
        """
        assert context.cache is None and context.document_lengths is None
        q, k, _ = self.project(x, context)
        scores = q.float() @ repeat_kv(k.float(), self.n_heads).mT * self.scale
        mask = context.attention_mask
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).tril()
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(dim=-1)


def repeat_kv(x: Tensor, n_heads: int) -> Tensor:
    """Each of the G heads of x (B, G, S, K) repeated for the H / G query heads that share it:
    (B, H, S, K).
    """
    return x.repeat_interleave(n_heads // x.size(1), dim=1)


# --- feed-forward ---------------------------------------------------------------------------------


def activate(kind: str, up: Tensor) -> Tensor:
    """The hidden layer (..., F) from the up projection: (..., 2F) for a kind with a gate,
    else (..., F).

    SwiGLU, GeGLU: silu(gate) · value, gelu(gate) · value (Shazeer 2020, equations 5 and 6).
    GELU: GPT-2's tanh form. Squared ReLU: So et al. 2021.
    """
    if kind in GATED:
        gate, value = up.chunk(2, dim=-1)  # (..., F) each
        return activate(GATED[kind], gate) * value
    if kind == "silu":
        return F.silu(up)
    return F.gelu(up, approximate="tanh") if kind == "gelu" else F.relu(up).square()


class FeedForward(nn.Module):
    """One hidden layer, applied to each position separately: down(activate(up(x)))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kind = config.ffn
        bias = config.bias == "all"
        # Gate and value are one matrix: one large product is faster than two small ones.
        width = config.d_ff * (2 if self.kind in GATED else 1)
        self.up = nn.Linear(config.d_model, width, bias=bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output (B, T, D), and the balance loss 0,
        so that dense and mixture layers are called alike.
        """
        hidden = activate(self.kind, self.up(x))  # (B, T, F)
        return self.down(hidden), x.new_zeros((), dtype=torch.float32)


class MixtureOfExperts(nn.Module):
    """Each token goes to its A best experts; their outputs are summed by router weight.

    As in Mixtral (Jiang et al. 2024). Tokens are sorted by expert, so that each expert is one
    matrix product over a slice. No token is dropped.

        token          0     1     2              sorted by expert   0  0 │ 1 │ 2  2  2
        its experts    0,2   2,0   1,2     ─▶     their tokens       0  1 │ 2 │ 0  1  2
    """

    def __init__(self, config: ModelConfig, moe: MoEConfig):
        super().__init__()
        self.kind = config.ffn
        self.n_experts = moe.n_experts
        self.top_k = moe.top_k
        E, D, hidden = moe.n_experts, config.d_model, config.d_ff
        width = hidden * (2 if self.kind in GATED else 1)
        self.router = nn.Linear(D, E, bias=False)
        self.up = nn.Parameter(torch.empty(E, width, D))
        self.down = nn.Parameter(torch.empty(E, D, hidden))
        biased = config.bias == "all"
        self.up_bias = nn.Parameter(torch.zeros(E, width)) if biased else None
        self.down_bias = nn.Parameter(torch.zeros(E, D)) if biased else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output (B, T, D) and the load-balance loss,
        which is 1 if all experts are used equally.
        """
        flat = x.reshape(-1, x.size(-1))  # (N, D)
        # The router scores each expert and keeps the A best per token.
        # fp32: rounding must not change the order of nearly equal probabilities
        probabilities = self.router(flat).float().softmax(dim=-1)  # (N, E)
        weights, experts = probabilities.topk(self.top_k, dim=-1)  # (N, A) each
        weights = weights / weights.sum(dim=-1, keepdim=True)  # (N, A): sums to 1 per token
        # Sort the N·A (token, expert) pairs by expert.
        order = experts.flatten().argsort(stable=True)  # (N·A,)
        tokens = order // self.top_k  # (N·A,): the token of each pair
        counts = torch.bincount(experts.flatten(), minlength=self.n_experts)  # (E,)
        # Run the experts, weight their outputs, and add them up per token.
        output = self._experts(flat[tokens], counts, experts.flatten()[order])  # (N·A, D)
        weighted = output * weights.flatten()[order, None].to(output.dtype)  # (N·A, D)
        mixed = torch.zeros_like(flat, dtype=output.dtype).index_add(0, tokens, weighted)  # (N, D)
        # Load balance, Fedus et al. 2021, equation 4: E · Σ over experts of (share of pairs) ·
        # (mean probability).
        balance = self.n_experts * (counts / order.numel() * probabilities.mean(dim=0)).sum()
        return mixed.view_as(x), balance

    def _experts(self, x: Tensor, counts: Tensor, expert_of: Tensor) -> Tensor:
        """The rows x (N·A, D), sorted by expert, each through its own expert's feed-forward
        layer.
        """
        up = grouped_linear(x, self.up, counts)  # (N·A, F or 2F)
        if self.up_bias is not None:
            up = up + self.up_bias[expert_of].to(up.dtype)
        hidden = activate(self.kind, up)  # (N·A, F)
        down = grouped_linear(hidden, self.down, counts)  # (N·A, D)
        return down if self.down_bias is None else down + self.down_bias[expert_of].to(down.dtype)


def grouped_linear(x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """The groups of rows of x (M, in), each times its own matrix of `weights` (E, out, in):
    (M, out).

    `counts` (E,) are the sizes of the groups. A loop over experts, never over tokens.
    """
    groups = x.split(counts.tolist())
    products = [F.linear(group, weight) for group, weight in zip(groups, weights, strict=True)]
    return torch.cat(products)


# --- the block and the decoder --------------------------------------------------------------------
#
#     pre (default)    x ─┬─▶ norm ─▶ attention ─▶ + ─┬─▶ norm ─▶ ffn ─▶ + ─▶
#                         └────────────────────────┘  └──────────────────┘
#     output (OLMo 2)  x ─┬─▶ attention ─▶ norm ─▶ + ─┬─▶ ffn ─▶ norm ─▶ + ─▶
#                         └────────────────────────┘  └──────────────────┘
#     sandwich (Gemma 2): both
#     post (2017)      x ─┬─▶ attention ─▶ + ─▶ norm ─┬─▶ ffn ─▶ + ─▶ norm ─▶
#                         └────────────────┘          └──────────┘


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.placement = config.norm_placement

        def norm_if(*placements: str) -> nn.Module:
            is_here = self.placement in placements
            return make_norm(config, config.d_model) if is_here else nn.Identity()

        self.attention_norm = norm_if("pre", "post", "sandwich")
        self.attention = Attention(config, layer)
        self.attention_output_norm = norm_if("output", "sandwich")
        self.ffn_norm = norm_if("pre", "post", "sandwich")
        moe = config.moe
        self.ffn = FeedForward(config) if moe is None else MixtureOfExperts(config, moe)
        self.ffn_output_norm = norm_if("output", "sandwich")
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """The residual stream (B, T, D) after this block, and its experts' balance loss
        (0 if dense).
        """
        if self.placement == "post":
            x = self.attention_norm(x + self.dropout(self.attention(x, context)))  # (B, T, D)
            added, balance = self.ffn(x)  # (B, T, D), scalar
            return self.ffn_norm(x + self.dropout(added)), balance
        # Otherwise the stream itself is never normalized, so gradients pass the sums unchanged.
        mixed = self.attention(self.attention_norm(x), context)
        x = x + self.dropout(self.attention_output_norm(mixed))  # (B, T, D)
        added, balance = self.ffn(self.ffn_norm(x))  # (B, T, D), scalar
        return x + self.dropout(self.ffn_output_norm(added)), balance


class Head(nn.Linear):
    """The output layer: logits (B, T, V) from hidden states (B, T, D)."""

    softcap: float | None = None
    """the logits are softcap · tanh(W h / softcap), as in Gemma 2 (hf_model.py); None: W h"""


class Decoder(nn.Module):
    """The decoder-only Transformer: `model(input_ids)` gives next-token logits
    (B, T, V) at all positions.
    """

    has_encoder = False  # encoder-decoder models are wrapped in hf_model.py

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError(
                "model.vocab_size is not set; build the decoder from a config with a known "
                "vocabulary"
            )
        self.config = config
        self.kinds, self.kind_of_layer = layer_kinds(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        if config.position == "learned":
            self.positions = nn.Embedding(config.max_seq_len, config.d_model)
        if config.bigram_rows:
            self.bigram_embedding = nn.Embedding(config.bigram_rows, config.d_model)
        self.dropout = nn.Dropout(config.residual_dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        # Each block reads a multiple of the stream plus one of the embedding, so that what the token
        # is need not be carried through all blocks.
        if config.input_scalars:
            self.stream_scalars = nn.Parameter(torch.empty(config.n_layers))
            self.input_scalars = nn.Parameter(torch.empty(config.n_layers))
        # After post-norm blocks the stream was just normalized; after all others it never was.
        last = config.norm_placement not in ("post", "none")
        self.norm = make_norm(config, config.d_model) if last else nn.Identity()
        self.head = Head(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        init_weights(self)

    @property
    def has_independent_rows(self) -> bool:
        """Whether a row of a batch of fixed size is rounded alike whatever the other rows are:
        experts read the tokens of all rows in one product, and dynamic frequencies are those of
        the longest row.
        """
        scaling = self.config.rope_scaling
        return self.config.moe is None and (scaling is None or scaling.type != "dynamic")

    def forward(
        self, input_ids: Tensor, *, document_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Logits (B, T, V) of ids (B, T); the arguments are those of `features`."""
        return self.head(self.features(input_ids, document_ids=document_ids, cache=cache).hidden)

    def features(
        self, input_ids: Tensor, *, document_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Features:
        """Everything but the head: a loss can apply it in chunks,
        sampling to the last position only.

        Args:
            input_ids: (B, T) token ids; with a cache, only the new ones.
            document_ids: (B, T) document number of each token in a packed row; attention does not
                cross documents and positions restart in each. Cannot be combined with a cache.
            cache: keys and values of the tokens before; those of the new tokens are added to it.
        """
        T = input_ids.size(1)
        length = T if cache is None else cache.length + T
        if length > self.config.max_seq_len:
            limit = self.config.max_seq_len
            raise ValueError(f"{length} positions are more than max_seq_len ({limit})")
        if cache is not None and document_ids is not None:
            raise ValueError("document_ids cannot be combined with a cache, which has no documents")
        # 1. Positions: 0, 1, ...; or after those in the cache, row by row if rows differ;
        #    or restarting in each packed document.
        if cache is not None:
            positions = cache.advance(T)  # (T,) or (B, T)
        elif document_ids is not None:
            positions = positions_in_documents(document_ids)  # (B, T)
        else:
            positions = torch.arange(T, device=input_ids.device)  # (T,)
        # 2. Embed the tokens.
        x = self.embedding(input_ids)  # (B, T, D)
        if self.config.scale_embeddings:
            x = x * math.sqrt(self.config.d_model)  # (B, T, D)
        if self.config.position == "learned":
            x = x + self.positions(positions)  # (B, T, D)
        if self.config.bigram_rows:
            if cache is None:  # position 0 starts a text
                before = torch.where(positions == 0, -1, input_ids.roll(1, dims=1))  # (B, T)
            else:
                before = cache.ids_before(positions, input_ids)  # (B, T)
            pairs = bigram_hash(before, input_ids, self.config.bigram_rows)  # (B, T)
            x = x + self.bigram_embedding(pairs)  # (B, T, D)
        embedded = x = self.dropout(x)
        # 3. Rotation angles and mask, the same for all layers of a kind.
        contexts = [attention_context(kind, positions, cache) for kind in self.kinds]
        # 4. The blocks. The balance loss is the mean over layers.
        balance = x.new_zeros((), dtype=torch.float32)
        for layer, block in enumerate(self.blocks):
            context = contexts[self.kind_of_layer[layer]]
            if self.config.input_scalars:
                x = self.stream_scalars[layer] * x + self.input_scalars[layer] * embedded
            if self.config.gradient_checkpointing and self.training:
                x, block_balance = checkpoint(block, x, context, use_reentrant=False)  # (B, T, D)
            else:
                x, block_balance = block(x, context)  # (B, T, D)
            balance = balance + block_balance / len(self.blocks)
        # 5. The last norm.
        return Features(self.norm(x), balance)  # (B, T, D)

    def new_cache(
        self,
        batch_size: int,
        max_len: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        chunk: int = 256,
    ) -> KVCache:
        """An empty cache for `max_len` positions (default max_seq_len).

        With a sliding window, a forward pass adds at most `chunk` positions.
        """
        weight = self.embedding.weight
        return models.kv_cache.KVCache(
            self.config,
            batch_size,
            max_len or self.config.max_seq_len,
            dtype=dtype or weight.dtype,
            device=weight.device,
            chunk=chunk,
        )


def extra_inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
    """The inputs of `features` besides the ids: the document of each token, or the prompt that an
    encoder reads.
    """
    return {name: batch[name] for name in ("document_ids", "prompt_ids") if name in batch}


# --- sizes ----------------------------------------------------------------------------------------


def count_parameters(model: nn.Module) -> int:
    """All weights, trainable or frozen, each tied matrix once; in 4 bits (nf4.py) a byte has two."""
    return sum(
        weight.numel() * (2 if weight.dtype == torch.uint8 else 1) for weight in model.parameters()
    )


def sized_parameters(model: Decoder) -> int:
    """The weights by which sizes of models are compared, as in tokens per parameter (Hoffmann et
    al. 2022): all but the bigram embedding, of which a token reads one row.
    """
    table = model.bigram_embedding.weight.numel() if model.config.bigram_rows else 0
    return count_parameters(model) - table


def active_parameters(model: nn.Module) -> int:
    """The weights that one token uses: all but the experts it is not routed to."""
    idle = 0
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            router = module.router.weight.numel()
            in_experts = count_parameters(module) - router
            idle += in_experts * (module.n_experts - module.top_k) // module.n_experts
    return count_parameters(model) - idle


def flops_per_token(model: Decoder, seq_len: int) -> int:
    """Floating-point operations to train on one token (PaLM, Chowdhery et al. 2022, appendix B).

        6 per weight of a matrix product  multiply and add forward, twice that backward
        12 · n_layers · H · K · S         q kᵀ and weights · v: 2 · 2 · H · K · S forward, twice backward

    An embedding lookup costs nothing; of a mixture only the A visited experts count. Norms, softmax
    and activations are not counted. S is the whole context, as in the paper; causal kernels skip
    half, so the attention term is up to two times too large.
    """
    config = model.config
    weights = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            packed = module.weight.dtype == torch.uint8  # in 4 bits (nf4.py) a byte has two
            size = module.in_features * module.out_features
            weights += size if packed else module.weight.numel()
        elif isinstance(module, MixtureOfExperts):
            weights += (module.up.numel() + module.down.numel()) * module.top_k // module.n_experts
    windows = [model.kinds[kind].sliding_window or seq_len for kind in model.kind_of_layer]
    seen = sum(min(seq_len, window) + config.n_sinks for window in windows)  # of all layers
    return 6 * weights + 12 * config.n_heads * config.head_dim * seen
