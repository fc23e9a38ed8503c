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

import itertools
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.config.model import ModelConfig, RopeScalingConfig
from tinylm.model.decoder import (
    AllHeadsNorm,
    Attention,
    Block,
    Decoder,
    FeedForward,
    Head,
    MixtureOfExperts,
    activate,
    attention_mask,
    bigram_hash,
    rotary_cos_sin,
)
from tinylm.model.kv_cache import KVCache
from tinylm.model.rounded import Int4Linear, Int8Linear, RoundedExperts

# All modules of a decoder that this file knows.
KNOWN = {
    *(
        Decoder,
        Block,
        Attention,
        FeedForward,
        MixtureOfExperts,
        RoundedExperts,
        Int8Linear,
        Int4Linear,
    ),
    *(
        Head,
        nn.Linear,
        nn.Embedding,
        nn.RMSNorm,
        AllHeadsNorm,
        nn.LayerNorm,
        nn.Identity,
        nn.Dropout,
        nn.ModuleList,
    ),
}
# A larger matrix is read as it is stored: the other layout, a copy, saves a tenth of the time.
MAX_COPIED_BYTES = 2**26
# Rows whose lengths round up to the same multiple of this are attended to together.
LENGTH_MULTIPLE = 64


class Kernel(Enum):
    """How a matrix of floats is read in a step."""

    PACKED = "packed for oneDNN"
    BY_COLUMN = "copied by column"
    AS_STORED = "as stored"


Function = Callable[[Tensor], Tensor]
LinearFunction = Callable[..., Tensor]
"""of x (B, in), and of a residual stream (B, out) that is added"""
Angles = tuple[Tensor, Tensor] | None
"""cosines and signed sines, each (1, K), or (B, 1, K) if rows differ"""


class LayerView(NamedTuple):
    """What one layer writes to and reads from the cache in a step."""

    keys: Tensor
    """the slots (B, G, K) of the new tokens; (B, G, slots, K), to be indexed, if rows differ"""
    values: Tensor
    index: tuple[Any, ...] | None
    seen: list[tuple[Tensor, Tensor, Tensor | None]]
    """keys and values (b, G, S, K) and the mask: of all rows, or of each group if they differ"""

    def write(self, k: Tensor, v: Tensor) -> None:
        """Store the new keys and values (B, G, K)."""
        if self.index is None:
            self.keys.copy_(k)
            self.values.copy_(v)
        else:
            self.keys[self.index] = k
            self.values[self.index] = v


def lean_step(model: nn.Module) -> "LeanStep | None":
    """The lean step of a model; None if it has none."""
    if lean_step_problem(model) is not None:
        return None
    assert not isinstance(model.head, Head) or model.head.softcap is None, "only of HFModel"
    return LeanStep(model)


def lean_step_problem(model: nn.Module) -> str | None:
    """Why a model has no lean step; None if it has one."""
    if not isinstance(model, Decoder):
        return "a model of another kind"
    if model.embedding.weight.device.type != "cpu":
        return "on a GPU, fewer launches matter and not the layout"
    for module in model.modules():
        if type(module) not in KNOWN:  # such as an adapter in training
            return f"{type(module).__name__} is not known to it"
    return None


class LeanStep:
    """`step(ids, cache)` is `model.head(model.features(ids[:, None], cache=cache).hidden[:, -1])`."""

    def __init__(self, model: Decoder):
        self.config = config = model.config
        self.embedding = model.embedding.weight
        self.bigrams = model.bigram_embedding.weight if config.bigram_rows else None
        self.positions = model.positions.weight if config.position == "learned" else None
        self.embedding_scale = config.d_model**0.5 if config.scale_embeddings else None
        self.kinds, self.kind_of_layer = model.kinds, model.kind_of_layer
        self.rotations: list[tuple[Tensor, Tensor]] | None = None  # of each kind of layer
        if config.position == "rope":
            self.rotations = []
            for kind in self.kinds:
                rotates = config.max_seq_len, config.head_dim, kind.rope_theta, kind.rope_scaling
                self.rotations.append(rotation_table(*rotates))
        self.blocks = [LeanBlock(block) for block in model.blocks]
        self.scalars: list[tuple[float, float]] | None = None  # of the stream and the embedding
        if config.input_scalars:
            pairs = torch.stack((model.stream_scalars, model.input_scalars), dim=1)
            self.scalars = [(stream, embedded) for stream, embedded in pairs.tolist()]
        self.norm = norm_function(model.norm)
        self.head = linear_function(model.head)

    @torch.inference_mode()
    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) of the token after `ids` (B,), which are added to `cache`."""
        positions = cache.advance(1)  # (1,), or (B, 1) if rows differ
        x = self.embedding[ids]  # (B, D)
        if self.embedding_scale is not None:
            x = x * self.embedding_scale
        if self.positions is not None:
            x = x + self.positions[positions.squeeze(-1)]  # (B, D)
        if self.bigrams is not None:
            before = cache.ids_before(positions, ids[:, None])  # (B, 1)
            x = x + self.bigrams[bigram_hash(before[:, 0], ids, len(self.bigrams))]  # (B, D)
        angles: list[Angles] = [None] * len(self.kinds)
        if self.rotations is not None:  # (1, K) each, or (B, 1, K)
            angles = [(cos[positions], sin[positions]) for cos, sin in self.rotations]
        embedded = x
        views = [cache_views(kind, positions, cache) for kind in self.kinds]
        for layer, (block, kind) in enumerate(zip(self.blocks, self.kind_of_layer, strict=True)):
            if self.scalars is not None:
                of_stream, of_embedded = self.scalars[layer]
                x = of_stream * x + of_embedded * embedded  # (B, D)
            x = block(x, angles[kind], views[kind][layer])  # (B, D)
        return self.head(self.norm(x))  # (B, V)


class LeanBlock:
    """Attention and feed-forward of one layer, each added to the residual stream."""

    def __init__(self, block: Block):
        self.post = block.placement == "post"
        self.attention_norm = norm_function(block.attention_norm)
        self.ffn_norm = norm_function(block.ffn_norm)
        self.attention = LeanAttention(block.attention)
        self.ffn = ffn_function(block.ffn)
        self.output_norms: tuple[Function, Function] | None = None
        if block.placement in ("output", "sandwich"):
            norms = block.attention_output_norm, block.ffn_output_norm
            self.output_norms = norm_function(norms[0]), norm_function(norms[1])

    def __call__(self, x: Tensor, angles: Angles, view: LayerView) -> Tensor:
        """The residual stream (B, D) after this block."""
        if self.post:
            x = self.attention_norm(self.attention(x, x, angles, view))
            return self.ffn_norm(self.ffn(x, x))
        if self.output_norms is not None:
            of_attention, of_ffn = self.output_norms
            x = x + of_attention(self.attention(None, self.attention_norm(x), angles, view))
            return x + of_ffn(self.ffn(None, self.ffn_norm(x)))
        x = self.attention(x, self.attention_norm(x), angles, view)
        return self.ffn(x, self.ffn_norm(x))


class LeanAttention:
    """Attention of one new token per row over the cache."""

    def __init__(self, attention: Attention):
        self.heads = H, G = attention.n_heads, attention.n_kv_heads
        self.head_dim = attention.head_dim
        self.rotates, self.scale = attention.rotates, attention.scale
        self.qkv, self.out = linear_function(attention.qkv), linear_function(attention.out)
        self.qk_norm = qk_norm_function(attention)
        self.sinks: tuple[Tensor, Tensor] | None = None
        if attention.n_sinks:
            self.sinks = attention.sink_keys, attention.sink_values  # (G, n_sinks, K) each

    def __call__(self, stream: Tensor | None, x: Tensor, angles: Angles, view: LayerView) -> Tensor:
        """A mixture of what the new tokens x (B, D) see, plus the residual stream (B, D) if given."""
        (H, G), K = self.heads, self.head_dim
        # One product for all heads: H of queries, G of keys, G of values.
        qk, v = self.qkv(x).view(-1, H + 2 * G, K).split((H + G, G), dim=1)
        # Queries and keys are normalized and rotated together.
        qk = self.qk_norm(qk)
        if angles is not None and self.rotates:
            qk = rotate(qk, *angles)  # (B, H + G, K)
        q, k = qk.split((H, G), dim=1)  # (B, H, K), (B, G, K)
        view.write(k, v)
        # The R queries that share a head are R rows of one product: no key is repeated.
        queries = q.reshape(-1, G, H // G, K)  # (B, G, R, K)
        if len(view.seen) == 1:
            mixed = self.attend(queries, *view.seen[0])  # (B, G, R, K)
        else:
            groups = queries.split([len(keys) for keys, _, _ in view.seen])
            groups = zip(groups, view.seen, strict=True)
            mixed = torch.cat([self.attend(group, *seen) for group, seen in groups])
        return self.out(mixed.reshape(-1, H * K), stream)  # (B, D)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(scale · q kᵀ + mask) v (b, G, R, K)."""
        if self.sinks is not None:
            sink_keys, sink_values = self.sinks
            keys = torch.cat((sink_keys.expand(len(keys), -1, -1, -1), keys), dim=2)
            values = torch.cat((sink_values.expand(len(keys), -1, -1, -1), values), dim=2)
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=self.scale
        )


# --- the cache ------------------------------------------------------------------------------------


def cache_views(config: ModelConfig, positions: Tensor, cache: KVCache) -> list[LayerView]:
    """The part of the cache that each layer writes and reads, cut out for all layers at once."""
    # One new token sees all that is stored, unless the rows differ, or a window or a bias says
    # otherwise.
    mask, first = None, 0
    window, lengths = config.sliding_window, cache.row_lengths
    is_windowed = window is not None and window < cache.filled
    if is_windowed and cache.window is None and lengths is None and config.position != "alibi":
        # All positions are stored in order, for layers of another kind: the window is a slice.
        first, is_windowed = cache.filled - window, False
    if lengths is not None or is_windowed or config.position == "alibi":
        mask = attention_mask(config, positions, cache.key_positions)  # (..., 1, n_sinks + S)
        G, R = config.n_kv_heads, config.n_heads // config.n_kv_heads
        heads = (G, R) if config.position == "alibi" else (1, 1)
        mask = mask.reshape(-1, *heads, mask.size(-1))  # (1|B, 1|G, 1|R, n_sinks + S)
        if mask.dtype == torch.bool:  # added in each layer: made a sum once
            mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        mask = mask.to(cache.values.dtype)
    parts = [(slice(None), cache.filled)]
    if lengths is not None:
        parts = list(row_groups(lengths, cache.slots))
    seen = []
    for rows, n_slots in parts:
        keys = cache.keys[:, rows, :, first:n_slots].unbind()  # of each layer (b, G, S, K)
        values = cache.values[:, rows, :, first:n_slots].unbind()
        of_part = None
        if mask is not None:
            n_columns = config.n_sinks + n_slots
            of_part = (mask if len(mask) == 1 else mask[rows])[..., :n_columns]
            # nothing is seen in the slots that only fill up the multiple
            of_part = F.pad(of_part, (0, n_columns - of_part.size(-1)), value=-torch.inf)
        seen.append([(key, value, of_part) for key, value in zip(keys, values, strict=True)])
    # The slot of the new token: the same in all rows, or one for each.
    keys, values, index = cache.keys, cache.values, None
    if positions.dim() == 1:
        slot = (cache.length - 1) % cache.slots
        keys, values = keys[:, :, :, slot], values[:, :, :, slot]
    else:
        slots = (positions % cache.slots).squeeze(-1)  # (B,)
        index = (torch.arange(len(slots)), slice(None), slots)
    layers = zip(keys.unbind(), values.unbind(), *seen, strict=True)
    return [LayerView(key, value, index, parts) for key, value, *parts in layers]


def row_groups(lengths: Sequence[int], limit: int) -> Iterator[tuple[slice, int]]:
    """Neighboring rows that are attended to in one call, and how many slots of each it reads: as
    many as a row has, rounded up to a multiple of LENGTH_MULTIPLE, which for these rows is the same.

    A row is so computed with a number of slots that depends on itself alone. The kernel then rounds
    it alike whatever the other rows of the call are.

    >>> list(row_groups([10, 64, 65, 3], limit=100))
    [(slice(0, 2, None), 64), (slice(2, 3, None), 100), (slice(3, 4, None), 64)]
    """
    n_slots = [min(-(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, limit) for length in lengths]
    start = 0
    for n, rows in itertools.groupby(n_slots):
        stop = start + len(list(rows))
        yield slice(start, stop), n
        start = stop


# --- rotation -------------------------------------------------------------------------------------


def rotation_table(
    n_positions: int, head_dim: int, theta: float, scaling: RopeScalingConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines, and sines with the sign of each half, of all positions: (n_positions, K) each.

    Each is that of the last token of a text, as a new token is.

    >>> cos, sin = rotation_table(2, 2, 10000.0)
    >>> rotate(torch.tensor([3.0, 4.0]), cos[1], sin[1])   # by 1 radian
    tensor([-1.7450,  4.6856])
    """
    positions = torch.arange(n_positions)
    cos, sin = rotary_cos_sin(positions, head_dim, theta, scaling, lengths=positions + 1)
    half = head_dim // 2
    return cos, torch.cat((-sin[:, :half], sin[:, half:]), dim=-1)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """x (..., K) rotated: (a, b) · cos + (b, a) · (-sin, sin), in fp32 as in decoder.py."""
    wide = x if x.dtype == cos.dtype else x.to(cos.dtype)
    swapped = wide.roll(x.size(-1) // 2, -1)  # (b, a)
    rotated = swapped.mul_(signed_sin).addcmul_(wide, cos)
    return rotated if x.dtype == cos.dtype else rotated.to(x.dtype)


# --- functions of modules -------------------------------------------------------------------------


def norm_function(norm: nn.Module) -> Function:
    """The norm as a function of (..., D)."""
    if isinstance(norm, nn.RMSNorm):
        # √D · x / √(Σx² + D·ε): three small kernels instead of seven.
        assert norm.eps is not None
        D = norm.weight.numel()
        weight, floor = norm.weight.detach().float() * D**0.5, torch.tensor((D * norm.eps) ** 0.5)
        length, hypot, wide = torch.linalg.vector_norm, torch.hypot, torch.float32
        if norm.weight.dtype == wide:
            return lambda x: torch.div(x, hypot(length(x, 2, -1, True), floor)).mul_(weight)
        # In bf16, the sum and the factors are fp32, as in torch's own norm.
        return lambda x: (
            torch.div(x, hypot(length(x, 2, -1, True, dtype=wide), floor)).mul_(weight).to(x.dtype)
        )
    if isinstance(norm, nn.LayerNorm):
        return norm.forward
    assert isinstance(norm, nn.Identity), norm
    return lambda x: x


def qk_norm_function(attention: Attention) -> Function:
    """The norms of queries and keys as one function of both, (B, H + G, K)."""
    H, G, K = attention.n_heads, attention.n_kv_heads, attention.head_dim
    q_norm, k_norm = attention.q_norm, attention.k_norm
    if isinstance(q_norm, AllHeadsNorm):
        of_q, of_k = norm_function(q_norm), norm_function(k_norm)

        def norm_all_heads(qk: Tensor) -> Tensor:
            q, k = qk.split((H, G), dim=1)  # (B, H, K), (B, G, K)
            joined = torch.cat((of_q(q.flatten(1)), of_k(k.flatten(1))), dim=1)
            return joined.view(-1, H + G, K)

        return norm_all_heads
    if isinstance(q_norm, nn.RMSNorm):
        weight = torch.cat((q_norm.weight.expand(H, K), k_norm.weight.expand(G, K)))  # (H + G, K)
        return lambda qk: F.rms_norm(qk, (K,), None, q_norm.eps) * weight
    return lambda qk: qk


def linear_function(linear: nn.Linear | Int8Linear) -> LinearFunction:
    """The layer as a function of (B, in), its matrix laid out for reading."""
    if isinstance(linear, Int8Linear):
        return rounded_function(linear)
    return matrix_function(linear.weight.detach(), linear.bias)


def rounded_function(linear: Int8Linear) -> LinearFunction:
    """A layer in 8 or 4 bits as a function of (B, in)."""
    product, few_rows_product = linear.product, linear.few_rows_function()
    # Without the checks of `product`, a step of one row takes 5% less time.
    limit = linear.few_rows if linear.bias is None else 0

    def rounded_linear(x: Tensor, stream: Tensor | None = None) -> Tensor:
        is_simple = len(x) <= limit and x.dtype is torch.bfloat16
        y = few_rows_product(x) if is_simple else product(x)  # (B, out)
        return y if stream is None else y.add_(stream)

    return rounded_linear


def matrix_kernel(dtype: torch.dtype, n_bytes: int) -> Kernel:
    """The fastest kernel for a matrix, as measured (docs/LOG.md)."""
    has_onednn = torch.backends.mkldnn.is_available()
    # The second is false on a CPU without AVX-512.
    if dtype is torch.bfloat16 and has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return Kernel.PACKED
    return Kernel.BY_COLUMN if n_bytes <= MAX_COPIED_BYTES else Kernel.AS_STORED


def matrix_function(weight: Tensor, bias: Tensor | None) -> LinearFunction:
    """x Wᵀ + bias for a matrix W (out, in), and plus the residual stream if it is given."""
    kernel = matrix_kernel(weight.dtype, weight.nbytes)
    if kernel is Kernel.PACKED:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        product = torch.ops.mkldnn._linear_pointwise

        def packed_linear(x: Tensor, stream: Tensor | None = None) -> Tensor:
            y = product(x, packed, bias, "none", [], "")  # (B, out)
            return y if stream is None else y.add_(stream)

        return packed_linear
    by_column = weight.T  # (in, out)
    if kernel is Kernel.BY_COLUMN:
        by_column = by_column.contiguous()

    def linear(x: Tensor, stream: Tensor | None = None) -> Tensor:
        if stream is None:
            stream = bias
        elif bias is not None:
            stream = stream + bias
        if stream is None:
            return torch.mm(x, by_column)
        return torch.addmm(stream, x, by_column)  # (B, out)

    return linear


def ffn_function(ffn: nn.Module) -> Callable[[Tensor | None, Tensor], Tensor]:
    """The feed-forward layer as a function of the residual stream, which may be None,
    and of its input, (B, D) each.
    """
    if isinstance(ffn, MixtureOfExperts):
        return LeanExperts(ffn)
    up, down, kind = linear_function(ffn.up), linear_function(ffn.down), ffn.kind
    return lambda stream, x: down(activate(kind, up(x)), stream)


class LeanExperts:
    """A mixture of experts: each visited expert reads its rows once."""

    def __init__(self, mixture: MixtureOfExperts):
        self.top_k, self.kind = mixture.top_k, mixture.kind
        self.router = linear_function(mixture.router)
        self.experts: list[tuple[LinearFunction, LinearFunction]] = []
        if isinstance(mixture, RoundedExperts):
            for up, down in zip(mixture.ups, mixture.downs, strict=True):
                self.experts.append((linear_function(up), linear_function(down)))
            return
        for expert in range(mixture.n_experts):
            up_bias = None if mixture.up_bias is None else mixture.up_bias[expert]
            down_bias = None if mixture.down_bias is None else mixture.down_bias[expert]
            up = matrix_function(mixture.up[expert].detach(), up_bias)
            down = matrix_function(mixture.down[expert].detach(), down_bias)
            self.experts.append((up, down))

    def __call__(self, stream: Tensor | None, x: Tensor) -> Tensor:
        """The output for x (B, D), plus the residual stream (B, D) if given."""
        probabilities = self.router(x).float().softmax(dim=-1)  # (B, E)
        weights, experts = probabilities.topk(self.top_k, dim=-1)  # (B, A) each
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        mixed = torch.zeros_like(x) if stream is None else stream.clone()
        for expert in experts.unique().tolist():
            rows, choice = (experts == expert).nonzero(as_tuple=True)
            up, down = self.experts[expert]
            output = down(activate(self.kind, up(x[rows])))  # (n, D)
            mixed.index_add_(0, rows, output * weights[rows, choice, None])
        return mixed
