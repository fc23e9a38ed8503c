"""Reading without end: a model that keeps the last positions of a text, and perhaps its first few (Xiao et al. 2023).

`streaming(model, window=124, first=4)` is the model with attention that sees, at each position, the first 4 tokens of the text
and the last 124. Distances are those within what is kept, as in the paper's section 3.2: after ten thousand tokens the first one is
127 back, and no angle is one that training never showed. Learned sinks stand at position 0, before everything.

For measuring: it reads whole rows at once, in fp32 and in blocks, and takes no cache.
"""


# B batch · T query positions · S key positions · H query heads · G key/value heads · K head width · C queries a block

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from tinylm.model.decoder import Attention, Decoder, Sight, rope_angles, rotate, visible

BLOCK = 256


def streaming(model: Decoder, *, window: int, first: int) -> Decoder:
    """A copy of `model` that reads as the module says, rows of any length; its weights are those of `model`.

    Raises:
        ValueError: the model has other positions than RoPE, so distances within what is kept are nothing it knows.
    """
    if model.config.position != "rope":
        raise ValueError(
            f"streaming needs position rope, and this model has {model.config.position}"
        )
    shared = {id(weight): weight for weight in model.parameters()}
    copied = copy.deepcopy(model, shared)
    copied.config = model.config.model_copy(
        update={"max_seq_len": 2**31 - 1, "sliding_window": None}
    )
    for block in copied.blocks:
        block.attention = StreamingAttention(
            block.attention, window, first, model.config.rope_theta
        )
    return copied


class StreamingAttention(nn.Module):
    """The attention that it is given, over the first `first` positions and the last `window`."""

    def __init__(self, attention: Attention, window: int, first: int, theta: float):
        super().__init__()
        self.attention, self.window, self.first, self.theta = attention, window, first, theta

    def forward(self, x: Tensor, sight: Sight) -> Tensor:
        B, T, _ = x.shape
        attention, n = self.attention, self.attention.n_sinks
        q, k, v = attention.project(x, replace(sight, angles=None))
        groups = attention.n_heads // attention.n_kv_heads
        k, v = (
            k.repeat_interleave(groups, dim=1),
            v.repeat_interleave(groups, dim=1),
        )  # (B, H, n + T, K)
        positions = sight.positions
        near_q, near_k = self._turned(q, positions), self._turned(k[:, :, n:], positions)
        # Where a query stands in what is kept: as far back as that, and no further, are the sinks and the first tokens.
        far_q = self._turned(q, positions.clamp(max=self.first + self.window - 1))
        far_k, far_v = (
            torch.cat((k[:, :, :n], near_k[:, :, : self.first]), dim=2),
            v[:, :, : n + self.first],
        )
        before_all = torch.cat((positions.new_full((n,), -1), positions[: self.first]))
        mixed = []
        for start in range(0, T, BLOCK):
            here = slice(start, min(start + BLOCK, T))
            near = slice(max(self.first, start - self.window + 1), max(self.first, here.stop))
            scores = torch.cat(
                (far_q[:, :, here] @ far_k.mT, near_q[:, :, here] @ near_k[:, :, near].mT), dim=-1
            ) / math.sqrt(attention.head_dim)
            seen = torch.cat(
                (
                    visible(positions[here], before_all, None),
                    visible(positions[here], positions[near], self.window),
                ),
                dim=-1,
            )
            weights = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)
            mixed.append(weights @ torch.cat((far_v, v[:, :, n:][:, :, near]), dim=2))
        return attention.out(torch.cat(mixed, dim=2).transpose(1, 2).reshape(B, T, -1))

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotate(x, *rope_angles(positions, self.attention.head_dim, self.theta))
