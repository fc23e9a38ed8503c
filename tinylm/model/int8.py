"""Weights in 8 bits: each row of a matrix is a row of whole numbers from -127 to 127, and a scale.

    w ≈ codes · scale          scale = max |w| / 127, one for each output (row)
    fp32 4 bytes a weight  ─▶  int8 1 byte and 2 bytes a row: a quarter of the memory to read

The embedding, norms, biases and the router of a mixture stay as they are: they are read by the row
or are small. Which kernel multiplies is decided by measurement (docs/LOG.md): for a few rows the
weights are read as int8 and multiplied in bf16; for many rows the inputs become int8 too, each row
with its own scale, so that no row depends on another.

Only for generation on the CPU, not for training. Knows nothing of text; `generate/weights.py` says
what the rounding costs in bits per byte.
"""

# N rows

import torch
from torch import Tensor, nn

from tinylm.common.errors import UserError
from tinylm.model.decoder import Decoder, MixtureOfExperts, activate

# Up to this many rows, reading the weights takes longer than multiplying.
FEW_ROWS = 4


class Int8Linear(nn.Module):
    """x Wᵀ + bias with W (out, in) in 8 bits; takes and returns the dtype of x."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        codes, scale = quantize_rows(weight.detach())
        self.codes: Tensor
        self.scale: Tensor
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.bias = bias
        # The kernel for a few rows reads 16 inputs at a time, without a check.
        self.few_rows = FEW_ROWS if weight.size(1) % 16 == 0 else 0
        self.packed = torch.ops.onednn.qlinear_prepack(codes, None)
        self.wide_scale = scale.float()
        self.zero_points = torch.zeros(len(codes), dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) gives (..., out)."""
        rows = x.reshape(-1, x.size(-1))  # (N, in)
        y = self.product(rows)  # (N, out)
        return y.view(*x.shape[:-1], -1)

    def product(self, rows: Tensor) -> Tensor:
        """(N, in) gives (N, out)."""
        if len(rows) <= self.few_rows:
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.codes, self.scale).to(rows.dtype)
        else:
            # Each row of inputs is scaled to its own largest number.
            wide = rows.float()
            largest = wide.abs().amax(dim=1, keepdim=True).clamp_(min=1e-30)  # (N, 1)
            codes = (wide * (127 / largest)).round_().to(torch.int8)  # (N, in)
            y = torch.ops.onednn.qlinear_pointwise(
                *(codes, 1 / 127, 0, self.packed, self.wide_scale, self.zero_points, None),
                *(1.0, 0, torch.float32, "none", [], ""),
            )
            y = y.mul_(largest).to(rows.dtype)
        return y if self.bias is None else y + self.bias


class Int8Experts(MixtureOfExperts):
    """A mixture of experts whose matrices have 8 bits."""

    def __init__(self, mixture: MixtureOfExperts):
        nn.Module.__init__(self)
        self.kind, self.top_k = mixture.kind, mixture.top_k
        self.n_experts, self.router = mixture.n_experts, mixture.router
        self.ups = expert_layers(mixture.up, mixture.up_bias)
        self.downs = expert_layers(mixture.down, mixture.down_bias)

    def _experts(self, x: Tensor, counts: Tensor, expert_of: Tensor) -> Tensor:
        groups = x.split(counts.tolist())  # the rows of each expert
        outputs = []
        for rows, up, down in zip(groups, self.ups, self.downs, strict=True):
            outputs.append(down(activate(self.kind, up(rows))) if len(rows) else rows)
        return torch.cat(outputs)


def expert_layers(weights: Tensor, biases: Tensor | None) -> nn.ModuleList:
    """A layer for each of the matrices (E, out, in)."""
    rows = [None] * len(weights) if biases is None else list(biases)
    layers = [Int8Linear(weight, bias) for weight, bias in zip(weights, rows, strict=True)]
    return nn.ModuleList(layers)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (out, in) in int8 and scales (out,) in bf16 of a matrix.

    >>> codes, scale = quantize_rows(torch.tensor([[127.0, -63.5], [0.0, 0.0]]))
    >>> codes.tolist(), scale.tolist()
    ([[127, -64], [0, 0]], [1.0, 1.0])
    """
    largest = weight.float().abs().amax(dim=1)  # (out,)
    # Rounded to bf16 first: the codes then make up for its error. A row of zeros gets any scale.
    scale = torch.where(largest > 0, largest / 127, 1.0).bfloat16()
    codes = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127)
    return codes.to(torch.int8), scale


@torch.no_grad()
def quantize(model: Decoder) -> None:
    """Replace the matrices of `model` by matrices of 8 bits.

    Raises:
        UserError: it is not on the CPU, or this PyTorch has no such kernels.
    """
    if model.embedding.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        problem = "8 bits are only supported on the CPU, with oneDNN"
        raise UserError("weights: int8", problem, "Use --device cpu, or fp32 weights")
    for block in model.blocks:
        for part in (block.attention, block.ffn):
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear) and name != "router":
                    setattr(part, name, Int8Linear(layer.weight, layer.bias))
        if isinstance(block.ffn, MixtureOfExperts):
            block.ffn = Int8Experts(block.ffn)
    model.head = Int8Linear(model.head.weight, None)
