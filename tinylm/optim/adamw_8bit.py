"""AdamW whose moments take 8 bits each in place of 32 (Dettmers et al. 2021, arXiv:2110.02861).

    m, v (weights) ─▶ blocks of 256 ─▶ each divided by its largest value ─▶ the nearest of 256 codes

The codes are spaced as a floating point number of a variable exponent, so that small values keep
their relative precision; a block with an outlier costs no other block. Moments of weights with
fewer than 4096 numbers stay in fp32. The step itself is that of AdamW (optimizers.py), in fp32, and
is computed by bitsandbytes.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tinylm.common.bnb import import_bitsandbytes

# Of bitsandbytes.
BLOCK = 256
N_CODES = 256
SMALLEST = 4096


class Optimizer8bit(torch.optim.Optimizer):
    """The kind of `make_adamw_8bit`'s optimizer, known without bitsandbytes, which would nest its
    tensors in the state for FSDP 1.
    """

    def state_dict(self) -> dict[str, Any]:
        return torch.optim.Optimizer.state_dict(self)


def make_adamw_8bit(groups: Iterable[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit over these groups, with the state of all other optimizers:
    a flat dictionary of tensors for each weight.
    """

    class AdamW8bit(Optimizer8bit, import_bitsandbytes().optim.AdamW8bit):
        """bitsandbytes' optimizer with the state of torch's."""

    return AdamW8bit(list(groups), **settings)


def state_shapes(weight: Tensor) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in the state of a weight, by name: codes, the largest values of
    their blocks, and the values of the codes, which all weights share.

    >>> state_shapes(torch.empty(512, 10))["absmax1"]
    (20,)
    """
    shapes = {"state1": tuple(weight.shape), "state2": tuple(weight.shape)}
    if weight.numel() < SMALLEST:
        return shapes
    n_blocks = math.ceil(weight.numel() / BLOCK)
    scales = {"absmax1": (n_blocks,), "absmax2": (n_blocks,)}
    return shapes | scales | {"qmap1": (N_CODES,), "qmap2": (N_CODES,)}


def trace_update(
    weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> None:
    """An update rule that takes the memory of a step on the CPU and makes none: for tensors without
    contents, which bitsandbytes does not take.
    """
    if state:
        # both moments, the gradient, and two steps to the denominator, in fp32
        temporary = [torch.empty_like(weight) for _ in range(5)]
        temporary.clear()
        return
    for name, shape in state_shapes(weight).items():
        if not name.startswith("qmap"):
            is_code = name.startswith("state") and weight.numel() >= SMALLEST
            dtype = torch.uint8 if is_code else torch.float32
            state[name] = torch.empty(shape, dtype=dtype, device=weight.device)
