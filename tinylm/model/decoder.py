"""The model, whole: a decoder-only Transformer that predicts the next token. Read this file first.

    token ids ─▶ embedding ─▶ n_layers × [ attention ─▶ feed-forward ] ─▶ norm ─▶ head ─▶ logits

In reading order: norms, positions (RoPE, ALiBi), the key/value cache, which keys a query may see, attention, the
feed-forward layers (dense and mixture of experts), the block, the decoder, and how it is initialised. Every choice is
a field of `ModelConfig`. One forward serves training and cached decoding. This file knows nothing of text, of
losses or of training loops.

Initialisation (`ModelConfig.init`):

| weights             | normal (GPT-2)         | trunc_normal (CS336)                         |
|---------------------|------------------------|----------------------------------------------|
| linear layers       | N(0, 0.02²)            | N(0, 2/(in+out)) cut at 3 std                |
| embeddings          | N(0, 0.02²)            | N(0, 1) cut at 3 std; 1/√D scale if tied     |
| norms, biases       | 1, 0                   | 1, 0                                         |
| sink keys, values   | N(0, 0.02²)            | N(0, 0.02²)                                  |

Queries, keys and values are stored as one matrix, and so are gate and value of swiglu; each is drawn by its own size.
"""


# B batch · T query positions · S key positions · D model width · H query heads · G key/value heads · K head width
# F feed-forward width · E experts · A experts a token · V vocabulary · N tokens = B*T

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinylm.config.schema import ModelConfig, MoEConfig


class Features(NamedTuple):
    """What the blocks compute: hidden states (B, T, D) after the last norm, and the experts' balance loss, a scalar."""

    hidden: Tensor
    balance_loss: Tensor


# --- norms ------------------------------------------------------------------------------------------------------------


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """The configured normalisation over the last dimension; biases only where the linear layers have them."""
    if config.norm == "layernorm":
        return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias == "all")
    return nn.RMSNorm(width, eps=config.norm_eps)


# --- positions --------------------------------------------------------------------------------------------------------


def rope_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., K) of the rotation of each position (Su et al. 2021, equation 34).

    Pair i turns by position / theta^(2i/K); pairs are (i, i + K/2), the half-split layout of Llama.
    """
    # fp32: in bf16 neighbouring positions beyond 256 would get the same angle
    # exp and not a power: the CPU compiler keeps what comes of an exp, and would work the angles out anew in each layer
    frequencies = torch.exp(
        torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
        * (-math.log(theta) / head_dim)
    )
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` (B, heads, T, K) turned by the angles of its positions; keeps the dtype of `x`."""
    return _Rotation.apply(x, cos, sin)


class _Rotation(torch.autograd.Function):
    """Turns forward; the gradient is turned back by the same angles, in half the passes over memory that autograd takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # Attention on the CPU hands over the gradient of the keys transposed, and every pass over that is slow.
        rows = grad if grad.stride(-1) == 1 else grad.contiguous()
        return _turned(rows, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (a, b) as (a cos - b sin, b cos + a sin)."""
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    first, second = wide.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1).mul_(sin).addcmul_(wide, cos).to(x.dtype)


def alibi_slopes(n_heads: int) -> Tensor:
    """The slope (H,) of each head: a geometric sequence from 2^(-8/H) (Press et al. 2021, section 3).

    For a number of heads that is no power of two, the sequence of the power below it, then every other term of the
    sequence of the power above.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2 ** (-4 * (2 * i + 1) / power) for i in range(n_heads - power)]
    return torch.tensor(slopes + between)


# --- the key/value cache ----------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of the positions so far, preallocated, G heads a layer (never expanded to H).

    Position p lives in slot p modulo `slots`. Without a sliding window there is a slot for each position. Under a window
    W the slots are a ring of W + chunk - 1, enough for a chunk of new positions to be written before its oldest query
    looks back, and a position that no query can see any more is overwritten.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_len: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        chunk: int,
    ):
        window = config.sliding_window
        self.slots = max_len if window is None else min(max_len, window + chunk - 1)
        self.chunk = chunk if self.slots < max_len else max_len
        self.max_len = max_len
        self.length = 0
        shape = (config.n_layers, batch_size, config.kv_heads, self.slots, config.size_of_head)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.positions = torch.zeros(
            self.slots, dtype=torch.long, device=device
        )  # which one each filled slot holds

    def advance(self, n_new: int) -> Tensor:
        """Positions (T,) of `n_new` tokens that are about to be written.

        Raises:
            ValueError: they do not fit, or are more at once than the ring was made for.
        """
        if self.length + n_new > self.max_len:
            raise ValueError(
                f"{self.length} + {n_new} positions do not fit in a cache of {self.max_len}"
            )
        if n_new > self.chunk:
            raise ValueError(
                f"{n_new} positions at once, and this ring takes chunks of {self.chunk}"
            )
        positions = torch.arange(self.length, self.length + n_new, device=self.positions.device)
        self.length += n_new
        self.positions[positions % self.slots] = positions
        return positions

    def write(
        self, layer: int, positions: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, G, T, K); all that are filled (B, G, S, K) come back."""
        slots = positions % self.slots
        self.keys[layer, :, :, slots] = keys.to(self.keys.dtype)
        self.values[layer, :, :, slots] = values.to(self.values.dtype)
        return self.keys[layer, :, :, : self.filled], self.values[layer, :, :, : self.filled]

    @property
    def filled(self) -> int:
        """Slots in use."""
        return min(self.length, self.slots)

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`, in that order, repeats allowed: one prompt to many samples, or surviving beams."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


# --- which keys a query sees ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sight:
    """Where the new tokens are and what each of them sees, worked out once a forward and shared by all layers.

    `mask` is None when plain causal attention (or, for a single new token, seeing everything) says it all; else boolean
    or, with ALiBi, an additive bias; it broadcasts to (B, H, T, n_sinks + S). `angles` are RoPE's, if there is any.
    """

    positions: Tensor
    angles: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    is_causal: bool
    cache: KVCache | None


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Whether the query at each position sees the key at each position: (..., T) and (..., S) give (..., T, S).

    A token sees itself and what came before, and of that the last `window` positions, itself included.

    >>> visible(torch.arange(4), torch.arange(4), 2).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    distance = queries[..., :, None] - keys[..., None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """Positions (B, T) that start again at 0 in each document; equal neighbouring ids are one document.

    >>> positions_in_documents(torch.tensor([[5, 5, 5, 6, 6]])).tolist()
    [[0, 1, 2, 0, 1]]
    """
    index = torch.arange(document_ids.size(1), device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


# --- attention --------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal self-attention with H query heads that share G key/value heads (Vaswani et al. 2017; Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_heads, self.n_kv_heads, self.head_dim = (
            config.n_heads,
            config.kv_heads,
            config.size_of_head,
        )
        self.dropout = config.attention_dropout
        queries, keys = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.qkv = nn.Linear(config.d_model, queries + 2 * keys, bias=config.bias != "none")
        self.out = nn.Linear(queries, config.d_model, bias=config.bias == "all")
        self.q_norm = (
            nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        )
        self.k_norm = (
            nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        )
        if config.n_sinks:
            self.sink_keys = nn.Parameter(
                torch.empty(self.n_kv_heads, config.n_sinks, self.head_dim)
            )
            self.sink_values = nn.Parameter(
                torch.empty(self.n_kv_heads, config.n_sinks, self.head_dim)
            )
        self.n_sinks = config.n_sinks

    def forward(self, x: Tensor, sight: Sight) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.project(x, sight)
        mixed = F.scaled_dot_product_attention(
            q.to(v.dtype), k.to(v.dtype), v,
            attn_mask=sight.mask if sight.mask is None or sight.mask.dtype == torch.bool else sight.mask.to(v.dtype),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=sight.is_causal,
            enable_gqa=self.n_kv_heads != self.n_heads,
        )  # fmt: skip
        return self.out(mixed.transpose(1, 2).reshape(B, T, -1))

    def project(self, x: Tensor, sight: Sight) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, K), and the keys and values (B, G, n_sinks + S, K) of all that they may look at."""
        B, T, _ = x.shape
        heads = (
            self.qkv(x)
            .view(B, T, self.n_heads + 2 * self.n_kv_heads, self.head_dim)
            .transpose(1, 2)
        )  # (B, H+2G, T, K)
        q, k, v = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if sight.angles is not None:
            q, k = rotate(q, *sight.angles), rotate(k, *sight.angles)
        if sight.cache is not None:
            k, v = sight.cache.write(self.layer, sight.positions, k, v)
        if self.n_sinks:
            # A sink is neither rotated nor biased: under ALiBi it is equally near to all, under RoPE it stands at position 0.
            k = torch.cat((self.sink_keys.to(k.dtype).expand(B, -1, -1, -1), k), dim=2)
            v = torch.cat((self.sink_values.to(v.dtype).expand(B, -1, -1, -1), v), dim=2)
        return q, k, v

    def weights(self, x: Tensor, sight: Sight) -> Tensor:
        """How much each query looks at each key, (B, H, T, n_sinks + S): what the fused kernel of `forward` never shows.

        Without a cache only; softmax(q kᵀ / √K) in fp32 (Vaswani et al. 2017, equation 1).
        """
        q, k, _ = self.project(x, sight)
        scores = (
            q.float()
            @ k.float().repeat_interleave(self.n_heads // self.n_kv_heads, dim=1).mT
            / math.sqrt(self.head_dim)
        )
        mask = sight.mask
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).tril()
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(dim=-1)


# --- feed-forward -----------------------------------------------------------------------------------------------------


def activate(kind: str, x: Tensor) -> Tensor:
    """The non-gated activations: SiLU, GELU in GPT-2's tanh form, or squared ReLU (So et al. 2021)."""
    if kind == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh") if kind == "gelu" else F.relu(x).square()


class FeedForward(nn.Module):
    """Each position by itself through one hidden layer; swiglu multiplies it by a gate (Shazeer 2020, equation 6)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kind = config.ffn
        bias = config.bias == "all"
        # The gate and the value of swiglu are one matrix: one large product is faster than two small ones.
        self.up = nn.Linear(
            config.d_model, config.hidden * (2 if self.kind == "swiglu" else 1), bias=bias
        )
        self.down = nn.Linear(config.hidden, config.d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.kind == "swiglu":
            gate, value = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * value)
        return self.down(activate(self.kind, x))


class MixtureOfExperts(nn.Module):
    """Each token goes to its top-k experts, whose outputs are summed by renormalised router weights (Jiang et al. 2024).

    Tokens are sorted by expert, so that each expert is one slice of one matrix product. No token is dropped.
    """

    def __init__(self, config: ModelConfig, moe: MoEConfig):
        super().__init__()
        self.kind, self.n_experts, self.top_k = config.ffn, moe.n_experts, moe.top_k
        width = config.hidden * (2 if self.kind == "swiglu" else 1)
        self.router = nn.Linear(config.d_model, moe.n_experts, bias=False)
        self.up = nn.Parameter(torch.empty(moe.n_experts, width, config.d_model))
        self.down = nn.Parameter(torch.empty(moe.n_experts, config.d_model, config.hidden))
        self.up_bias = (
            nn.Parameter(torch.zeros(moe.n_experts, width)) if config.bias == "all" else None
        )
        self.down_bias = (
            nn.Parameter(torch.zeros(moe.n_experts, config.d_model))
            if config.bias == "all"
            else None
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mixed output (B, T, D) and the load-balance loss, a scalar that is 1 when all experts are used alike."""
        flat = x.reshape(-1, x.size(-1))  # (N, D)
        # fp32: the order of near-equal probabilities decides who computes
        probabilities = self.router(flat).float().softmax(dim=-1)  # (N, E)
        weights, experts = probabilities.topk(self.top_k, dim=-1)  # (N, A)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        order = experts.flatten().argsort(stable=True)  # the N*A visits, sorted by expert
        tokens = order // self.top_k
        counts = torch.bincount(experts.flatten(), minlength=self.n_experts)
        visited = self._experts(flat[tokens], counts, experts.flatten()[order])
        weighted = visited * weights.flatten()[order, None].to(visited.dtype)
        mixed = torch.zeros_like(flat, dtype=visited.dtype).index_add(0, tokens, weighted)
        # Fedus et al. 2021, equation 4: E · Σ (share of visits) · (mean probability)
        balance = self.n_experts * (counts / order.numel() * probabilities.mean(dim=0)).sum()
        return mixed.view_as(x), balance

    def _experts(self, x: Tensor, counts: Tensor, expert_of: Tensor) -> Tensor:
        """Every visit (N*A, D), sorted by expert, through its expert."""
        up = grouped_linear(x, self.up, counts)
        if self.up_bias is not None:
            up = up + self.up_bias[expert_of].to(up.dtype)
        if self.kind == "swiglu":
            gate, value = up.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        else:
            hidden = activate(self.kind, up)
        down = grouped_linear(hidden, self.down, counts)
        return down if self.down_bias is None else down + self.down_bias[expert_of].to(down.dtype)


def grouped_linear(x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """Rows of `x` (M, in), sorted in groups of `counts` (E,), each group by its own matrix of `weights` (E, out, in).

    A loop over experts, never over tokens.
    """
    groups = x.split(counts.tolist())
    return torch.cat(
        [F.linear(group, weight) for group, weight in zip(groups, weights, strict=True)]
    )


# --- the block and the decoder ----------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.placement = config.norm_placement
        normed = self.placement != "none"
        self.attention_norm = make_norm(config, config.d_model) if normed else nn.Identity()
        self.attention = Attention(config, layer)
        self.ffn_norm = make_norm(config, config.d_model) if normed else nn.Identity()
        self.ffn = (
            FeedForward(config) if config.moe is None else MixtureOfExperts(config, config.moe)
        )
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
        """The stream (B, T, D) after this block, and the balance loss of its experts (0 without any)."""
        if self.placement == "post":  # norms after the sums, as in Vaswani et al. 2017
            x = self.attention_norm(x + self.dropout(self.attention(x, sight)))
            added, balance = self._feed(x)
            return self.ffn_norm(x + self.dropout(added)), balance
        x = x + self.dropout(self.attention(self.attention_norm(x), sight))
        added, balance = self._feed(self.ffn_norm(x))
        return x + self.dropout(added), balance

    def _feed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.ffn, MixtureOfExperts):
            return self.ffn(x)
        return self.ffn(x), x.new_zeros((), dtype=torch.float32)


class Decoder(nn.Module):
    """The decoder-only Transformer: `model(input_ids)` gives the logits (B, T, V) of the next token at every position."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError(
                "the decoder needs model.vocab_size; build it from a config whose vocabulary is known"
            )
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        if config.position == "learned":
            self.positions = nn.Embedding(config.max_seq_len, config.d_model)
        self.dropout = nn.Dropout(config.residual_dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        # After pre-norm blocks the stream has never been normalised as a whole; after post-norm it just was.
        self.norm = (
            make_norm(config, config.d_model) if config.norm_placement == "pre" else nn.Identity()
        )
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        initialise(self)

    def forward(
        self, input_ids: Tensor, *, document_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Logits (B, T, V) of ids (B, T)."""
        return self.head(self.features(input_ids, document_ids=document_ids, cache=cache).hidden)

    def features(
        self, input_ids: Tensor, *, document_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Features:
        """Everything but the head, so that a loss can take the vocabulary in chunks and sampling only the last position.

        Args:
            input_ids: (B, T) token ids; with a cache, only the new ones.
            document_ids: (B, T) a number a document; attention stops and positions restart where it changes. Not with a cache.
            cache: keys and values of what came before; the new ones are added to it.
        """
        positions = self._positions(input_ids, document_ids, cache)
        x = self.embedding(input_ids)
        if self.config.position == "learned":
            x = x + self.positions(positions)
        x = self.dropout(x)
        sight = self._sight(positions, cache)
        balance = x.new_zeros((), dtype=torch.float32)
        for block in self.blocks:
            if self.config.gradient_checkpointing and self.training:
                x, block_balance = checkpoint(block, x, sight, use_reentrant=False)
            else:
                x, block_balance = block(x, sight)
            balance = balance + block_balance / len(self.blocks)
        return Features(self.norm(x), balance)

    def opening(
        self, prompts: Sequence[Sequence[int]]
    ) -> tuple[Sequence[Sequence[int]], dict[str, Tensor]]:
        """The ids that stand before what is written after each prompt, and what `features` takes beside ids: here the prompts, and nothing.

        For a model that has an encoder the two are others (foreign.py).
        """
        return prompts, {}

    def arranged(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of rows as the model takes it: here as it is."""
        return batch

    def new_cache(
        self,
        batch_size: int,
        max_len: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        chunk: int = 256,
    ) -> KVCache:
        """An empty cache for `max_len` positions (max_seq_len if None), fed at most `chunk` at a time under a window."""
        weight = self.embedding.weight
        return KVCache(
            self.config,
            batch_size,
            max_len or self.config.max_seq_len,
            dtype=dtype or weight.dtype,
            device=weight.device,
            chunk=chunk,
        )

    def _positions(
        self, input_ids: Tensor, document_ids: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """The position of each new token: (T,), or (B, T) if they restart in each document."""
        T = input_ids.size(1)
        length = T if cache is None else cache.length + T
        if length > self.config.max_seq_len:
            raise ValueError(
                f"{length} positions are more than max_seq_len ({self.config.max_seq_len})"
            )
        if cache is None:
            return (
                torch.arange(T, device=input_ids.device)
                if document_ids is None
                else positions_in_documents(document_ids)
            )
        if document_ids is not None:
            raise ValueError(
                "a cache holds one document a row: give document_ids or a cache, not both"
            )
        return cache.advance(T)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.config.position != "rope":
            return None
        cos, sin = rope_angles(
            positions, self.config.size_of_head, self.config.rope_theta
        )  # ([B,] T, K)
        return (cos[:, None], sin[:, None]) if positions.dim() == 2 else (cos, sin)

    def _sight(self, positions: Tensor, cache: KVCache | None) -> Sight:
        """What this forward needs to know of its positions (T,) or (B, T)."""
        keys = positions if cache is None else cache.positions[: cache.filled]
        T, S, window = positions.size(-1), keys.size(-1), self.config.sliding_window
        mask, is_causal = None, S == T
        # One mask-free kernel says it all: causal over a whole sequence, or one new token that sees all that is stored.
        special = self.config.position == "alibi" or self.config.n_sinks or positions.dim() == 2
        if special or (window is not None and window < S) or (S != T and T > 1):
            mask, is_causal = self._mask(positions, keys), False
        return Sight(positions, self._angles(positions), mask, is_causal, cache)

    def _mask(self, positions: Tensor, keys: Tensor) -> Tensor:
        """What queries at `positions` see of keys at `keys`: booleans or an additive bias, (..., T, n_sinks + S)."""
        config = self.config
        seen, distance = (
            visible(positions, keys, config.sliding_window),
            positions[..., :, None] - keys[..., None, :],
        )
        if positions.dim() == 2:
            starts = (
                torch.arange(positions.size(1), device=positions.device) - positions
            )  # where each token's document begins
            seen = (seen & (starts[:, :, None] == starts[:, None, :]))[:, None]  # (B, 1, T, S)
            distance = distance[:, None]
        if config.position == "alibi":
            slopes = alibi_slopes(config.n_heads).to(distance.device)
            seen = (-slopes[:, None, None] * distance).masked_fill(
                ~seen, -math.inf
            )  # (..., H, T, S)
        if config.n_sinks:
            seen = F.pad(seen, (config.n_sinks, 0), value=True if seen.dtype == torch.bool else 0.0)
        return seen


# --- initialisation ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def initialise(model: Decoder) -> None:
    """Fill the weights as the table at the top of this file says, in the order of the modules, from torch's generator."""
    for name, weight in model.named_parameters():  # a tied matrix comes once, as the embedding
        if name.endswith("bias"):
            nn.init.zeros_(weight)
        elif name.endswith("norm.weight"):
            nn.init.ones_(weight)
        elif model.config.init == "normal" or ".sink_" in name:
            nn.init.normal_(weight, std=0.02)
        else:
            for matrix in _matrices(name, weight, model.config):
                std = _truncated_std(name, matrix, tied=model.config.tie_embeddings)
                nn.init.trunc_normal_(matrix, std=std, a=-3 * std, b=3 * std)


def _matrices(name: str, weight: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
    """What is stored as one matrix and meant as several: queries, keys and values; gate and value of swiglu."""
    if name.endswith("qkv.weight"):
        queries, keys = config.n_heads * config.size_of_head, config.kv_heads * config.size_of_head
        return weight.split((queries, keys, keys))
    if ".ffn.up" in name and config.ffn == "swiglu":
        return weight.chunk(2, dim=-2)
    return (weight,)


def _truncated_std(name: str, weight: Tensor, *, tied: bool) -> float:
    """sqrt(2 / (in + out)) for a linear layer, 1 for an embedding."""
    if name in ("embedding.weight", "positions.weight"):
        return (
            weight.size(1) ** -0.5 if tied else 1.0
        )  # as a head, std 1 would give logits of size sqrt(D)
    return math.sqrt(2 / (weight.size(-1) + weight.size(-2)))


# --- sizes ------------------------------------------------------------------------------------------------------------


def count_parameters(model: nn.Module) -> int:
    """Trainable and fixed weights, each tied matrix once."""
    return sum(weight.numel() for weight in model.parameters())


def active_parameters(model: nn.Module) -> int:
    """The weights that one token meets: all but those of the experts it is not sent to."""
    idle = 0
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            of_experts = sum(
                weight.numel()
                for name, weight in module.named_parameters()
                if not name.startswith("router")
            )
            idle += of_experts * (module.n_experts - module.top_k) // module.n_experts
    return count_parameters(model) - idle


def flops_per_token(model: Decoder, seq_len: int) -> int:
    """Floating-point operations of one training token, forward and backward (Chowdhery et al. 2022, appendix B).

    6 for each weight that multiplies, only the visited experts of a mixture, plus 12 · L · H · K · S for attention.
    """
    config = model.config
    weights = sum(
        w.numel()
        for m in model.modules()
        if isinstance(m, nn.Linear)
        for n, w in m.named_parameters(recurse=False)
        if n == "weight"
    )
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            weights += (module.up.numel() + module.down.numel()) * module.top_k // module.n_experts
    seen = min(seq_len, config.sliding_window or seq_len) + config.n_sinks
    return 6 * weights + 12 * config.n_layers * config.n_heads * config.size_of_head * seen
