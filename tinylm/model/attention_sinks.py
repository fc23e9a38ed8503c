"""Texts of any length: attention over the last positions and the first few tokens
(StreamingLLM, Xiao et al. 2023).

    with_attention_sinks(model, window=3, n_first=2), query 9:     keys   0 1 · · · · · 7 8 9
                                                                 positions    0 1           2 3 4

The copy of the model sees, at each position, the first `n_first` tokens of the text and the last
`window`, or sliding_window of a layer where that is less. Distances are counted within the kept
keys (section 3.2 of the paper): after ten thousand tokens the first one is at most
n_first + window - 1 positions away, so no rotation angle occurs that training has not seen. Learned
sinks (`model.n_sinks`) are at position 0, before everything.

For measurements: it reads whole rows at once, in fp32 and in blocks of queries, and takes no cache.
"""


# B batch · T query positions · S key positions · H query heads · K head width
# Q queries of a block

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from tinylm.config.schema import ModelConfig
from tinylm.model.decoder import (
    Attention,
    AttentionContext,
    Decoder,
    apply_rotary,
    causal_mask,
    repeat_kv,
    rotary_cos_sin,
)

QUERY_BLOCK = 256


def with_attention_sinks(model: Decoder, *, window: int, n_first: int) -> Decoder:
    """A copy of `model` with such an attention, for rows of any length;
    it shares the weights of `model`.

    Raises:
        ValueError: the model's positions are not rotary, so distances within the kept keys mean
            nothing to it, or its rotation depends on the length of the text.
    """
    scaling = model.config.rope_scaling
    if model.config.position != "rope":
        raise ValueError(
            f"attention sinks need model.position rope, and this model has {model.config.position}"
        )
    if scaling is not None and scaling.type == "dynamic":
        raise ValueError("attention sinks need a rotation that does not depend on the length")
    shared = {id(weight): weight for weight in model.parameters()}
    copied = copy.deepcopy(model, shared)
    unlimited = {"max_seq_len": 2**31 - 1, "sliding_window": None, "full_attention_interval": None}
    copied.config = model.config.model_copy(update=unlimited)
    copied.kinds = [kind.model_copy(update=unlimited) for kind in model.kinds]
    for block, kind in zip(copied.blocks, model.kind_of_layer, strict=True):
        config = model.kinds[kind]
        seen = min(window, config.sliding_window or window)
        block.attention = StreamingAttention(block.attention, seen, n_first, config)
    return copied


class StreamingAttention(nn.Module):
    """The projections of `attention`, applied to the first `n_first`
    and the last `window` positions.
    """

    def __init__(self, attention: Attention, window: int, n_first: int, config: ModelConfig):
        super().__init__()
        self.attention = attention
        self.window = window
        self.n_first = n_first
        self.theta, self.scaling = config.rope_theta, config.rope_scaling

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        B, T, _ = x.shape
        attention, n_first, window = self.attention, self.n_first, self.window
        n = attention.n_sinks
        # Unrotated queries and keys: the same key is rotated for two positions below.
        q, k, v = attention.project(x, replace(context, cos_sin=None))
        k = repeat_kv(k, attention.n_heads)  # (B, H, n + T, K)
        v = repeat_kv(v, attention.n_heads)  # (B, H, n + T, K)
        positions = context.positions  # (T,)
        # Near: the window, at its true positions.
        near_q = self._rotated(q, positions)  # (B, H, T, K)
        near_k = self._rotated(k[:, :, n:], positions)  # (B, H, T, K)
        near_v = v[:, :, n:]
        # Far: sinks and first tokens. For them a query is at its position among the kept keys, at
        # most n_first + window - 1.
        far_q = self._rotated(q, positions.clamp(max=n_first + window - 1))  # (B, H, T, K)
        far_k = torch.cat((k[:, :, :n], near_k[:, :, :n_first]), dim=2)  # (B, H, n + n_first, K)
        far_v = v[:, :, : n + n_first]
        far_positions = torch.cat((positions.new_full((n,), -1), positions[:n_first]))
        # In blocks of queries, so that the scores take Q · (Q + window) numbers per head, not T².
        mixed = []
        for start in range(0, T, QUERY_BLOCK):
            block = slice(start, min(start + QUERY_BLOCK, T))
            near = slice(max(n_first, start - window + 1), max(n_first, block.stop))
            far_scores = far_q[:, :, block] @ far_k.mT  # (B, H, Q, n + n_first)
            near_scores = near_q[:, :, block] @ near_k[:, :, near].mT  # (B, H, Q, S)
            scores = torch.cat((far_scores, near_scores), dim=-1) * attention.scale
            far_mask = causal_mask(positions[block], far_positions, None)
            near_mask = causal_mask(positions[block], positions[near], window)
            mask = torch.cat((far_mask, near_mask), dim=-1)  # (Q, n + n_first + S)
            weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
            mixed.append(weights @ torch.cat((far_v, near_v[:, :, near]), dim=2))  # (B, H, Q, K)
        return attention.out(torch.cat(mixed, dim=2).transpose(1, 2).reshape(B, T, -1))  # (B, T, D)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        if not self.attention.rotates:
            return x
        width = self.attention.head_dim
        cos, sin = rotary_cos_sin(positions, width, self.theta, self.scaling)
        return apply_rotary(x, cos, sin)
