"""Weights in 8 or 4 bits. In 8 bits, each row of a matrix is a row of whole numbers from -127 to 127, and a scale.

    w ≈ codes · scale          scale = max |w| / 127, one for each output (row)
    fp32 4 bytes a weight  ─▶  int8 1 byte and 2 bytes a row: a quarter of the memory to read

The embedding, norms, biases and the router of a mixture stay as they are: they are read by the row
or are small. Of a tied embedding and head, one matrix, both have the rounded values. Which kernel
multiplies is decided by measurement (docs/LOG.md): for a few rows the weights are read as int8 and
multiplied in bf16; for many rows the inputs become int8 too, each row with its own scale, so that no
row depends on another. A CPU without instructions for products of int8 multiplies many rows in fp32.

In 4 bits, 32 inputs of a row have a scale and an offset of their own:

    w ≈ (code - 8) · scale + offset          code from 0 to 15: 0.625 bytes a weight with both

A few rows read these; many rows read 8-bit codes of the same rounded numbers, as multiplying 4 bits
by many rows is slower (docs/LOG.md). A matrix whose shape the kernel of 4 bits does not have keeps
8 bits.

    Decoder ─ rounded_matrices ─▶ RoundedWeights ─ install ─▶ Decoder with Int8Linear, Int4Linear
                                      │ in a checkpoint
                                      └─ dequantized ─▶ fp32 weights, for training and export

Only for generation on the CPU, not for training. Knows nothing of text; `generate/weights.py` says
what the rounding costs in bits per byte.
"""

# N rows

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tinylm.common.errors import UserError
from tinylm.model.decoder import Decoder, MixtureOfExperts, activate

# By bits: up to this many rows, reading the weights takes longer than multiplying.
FEW_ROWS = {8: 4, 4: 8}
# The same where many rows are multiplied in fp32, which takes longer.
FEW_ROWS_FP32 = {8: 16, 4: 16}
# Inputs of a row that share a scale and an offset in 4 bits.
GROUP = 32

Rounded = tuple[Tensor, ...]
"""A matrix (..., out, in). 8 bits: codes (..., out, in) in int8, scales (..., out) in bf16. 4 bits:
codes (..., out, in / 2) in uint8, two in a byte; scales and offsets (..., out, in / GROUP) in bf16"""

RoundedWeights = dict[str, Rounded]
"""matrices by the name of the weight"""


def few_rows(bits: int, n_inputs: int) -> int:
    """Up to how many rows are multiplied in bf16. `_weight_int8pack_mm` reads 16 inputs at a time,
    without a check.
    """
    limits = FEW_ROWS if multiplies_int8() else FEW_ROWS_FP32
    return limits[bits] if n_inputs % 16 == 0 else 0


@functools.cache
def multiplies_int8() -> bool:
    """Whether products of int8 are exact on this CPU. Without VNNI, oneDNN adds two products of a
    byte and an int8 in 16 bits, where 2 · 255 · 127 is more than the largest number.
    """
    ones, codes = torch.ones(64), torch.full((16, 64), 127, dtype=torch.int8)  # (out, in)
    product = int8_product(codes, ones[:16])(ones.expand(32, 64))
    return torch.equal(product.round(), torch.full((32, 16), 127.0 * 64))


def int8_product(codes: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    """The product (N, in) to (N, out) in fp32 with inputs in 8 bits."""
    packed = torch.ops.onednn.qlinear_prepack(codes, None)
    zero_points = torch.zeros(len(codes), dtype=torch.int32)
    wide_scale = scale.float()

    def product(rows: Tensor) -> Tensor:
        # Each row of inputs is scaled to its own largest number.
        wide = rows.float()
        largest = wide.abs().amax(dim=1, keepdim=True).clamp_(min=1e-30)  # (N, 1)
        inputs = (wide * (127 / largest)).round_().to(torch.int8)  # (N, in)
        y = torch.ops.onednn.qlinear_pointwise(
            *(inputs, 1 / 127, 0, packed, wide_scale, zero_points, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        return y.mul_(largest)

    return product


def fp32_product(codes: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    """The product (N, in) to (N, out) in fp32, the codes converted each time: a copy of the matrix
    would take four times the memory.
    """
    wide_scale = scale.float()
    return lambda rows: torch.mm(rows.float(), codes.float().T).mul_(wide_scale)


class Int8Linear(nn.Module):
    """x Wᵀ + bias with W (out, in) in 8 bits; takes and returns the dtype of x."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None):
        super().__init__()
        self.codes: Tensor
        self.scale: Tensor
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.few_rows = few_rows(8, codes.size(1))
        product = int8_product if multiplies_int8() else fp32_product
        self.many_rows_function = product(codes, scale)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) gives (..., out)."""
        rows = x.reshape(-1, x.size(-1))  # (N, in)
        y = self.product(rows)  # (N, out)
        return y.view(*x.shape[:-1], -1)

    def product(self, rows: Tensor) -> Tensor:
        """(N, in) gives (N, out)."""
        if len(rows) <= self.few_rows:
            y = self.few_rows_function()(rows.bfloat16()).to(rows.dtype)
        else:
            y = self.many_rows_function(rows).to(rows.dtype)
        return y if self.bias is None else y + self.bias

    def few_rows_function(self) -> Callable[[Tensor], Tensor]:
        """`product` of a few rows in bf16, without the bias, as a function: a module takes longer."""
        codes, scale = self.codes, self.scale
        return lambda rows: torch._weight_int8pack_mm(rows, codes, scale)


class Int4Linear(Int8Linear):
    """The same with W in 4 bits, and 8-bit codes of its numbers for many rows."""

    def __init__(self, codes: Tensor, scale: Tensor, offset: Tensor, bias: Tensor | None):
        super().__init__(*quantize_rows(dequantize_groups(codes, scale, offset)), bias)
        del self.codes  # `many_rows_function` has what it needs
        self.few_rows = few_rows(4, 2 * codes.size(1))
        self.packed_int4: Tensor
        self.factors: Tensor
        # As the kernel of this machine reads them.
        packed = torch._convert_weight_to_int4pack_for_cpu(unpack_nibbles(codes).int(), 2)
        factors = torch.stack((scale, offset), dim=2).transpose(0, 1)  # (in / GROUP, out, 2)
        self.register_buffer("packed_int4", packed)
        self.register_buffer("factors", factors.contiguous())

    def few_rows_function(self) -> Callable[[Tensor], Tensor]:
        """`product` of a few rows in bf16, without the bias, as a function: a module takes longer."""
        packed, factors = self.packed_int4, self.factors
        return lambda rows: torch._weight_int4pack_mm_for_cpu(rows, packed, GROUP, factors)


def bits_of(matrix: Rounded) -> int:
    """The bits of its codes."""
    return 8 if len(matrix) == 2 else 4


def rounded_layer(matrix: Rounded, bias: Tensor | None) -> Int8Linear:
    """A layer with a matrix (out, in)."""
    layer = Int8Linear if bits_of(matrix) == 8 else Int4Linear
    return layer(*matrix, bias)


class RoundedExperts(MixtureOfExperts):
    """A mixture of experts whose matrices have 8 or 4 bits."""

    def __init__(self, mixture: MixtureOfExperts, up: Rounded, down: Rounded):
        nn.Module.__init__(self)
        self.kind, self.top_k = mixture.kind, mixture.top_k
        self.n_experts, self.router = mixture.n_experts, mixture.router
        self.ups = expert_layers(up, mixture.up_bias)
        self.downs = expert_layers(down, mixture.down_bias)

    def _experts(self, x: Tensor, counts: Tensor, expert_of: Tensor) -> Tensor:
        groups = x.split(counts.tolist())  # the rows of each expert
        outputs = []
        for rows, up, down in zip(groups, self.ups, self.downs, strict=True):
            outputs.append(down(activate(self.kind, up(rows))) if len(rows) else rows)
        return torch.cat(outputs)


def expert_layers(matrices: Rounded, biases: Tensor | None) -> nn.ModuleList:
    """A layer for each of the matrices (E, out, in)."""
    layers = []
    for expert, matrix in enumerate(zip(*matrices, strict=True)):
        bias = None if biases is None else biases[expert]
        layers.append(rounded_layer(matrix, bias))
    return nn.ModuleList(layers)


# --- rounding -------------------------------------------------------------------------------------


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (..., out, in) in int8 and scales (..., out) in bf16 of a matrix.

    >>> codes, scale = quantize_rows(torch.tensor([[127.0, -63.5], [0.0, 0.0]]))
    >>> codes.tolist(), scale.tolist()
    ([[127, -64], [0, 0]], [1.0, 1.0])
    """
    largest = weight.float().abs().amax(dim=-1)  # (..., out)
    # Rounded to bf16 first: the codes then make up for its error. A row of zeros gets any scale.
    scale = torch.where(largest > 0, largest / 127, 1.0).bfloat16()
    codes = (weight.float() / scale.float()[..., None]).round().clamp(-127, 127)
    return codes.to(torch.int8), scale


def dequantize_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """The matrix (..., out, in) in fp32."""
    return codes.float() * scale.float()[..., None]


def quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (..., out, in / 2), scales and offsets (..., out, in / GROUP) of a matrix in 4 bits."""
    groups = weight.float().unflatten(-1, (-1, GROUP))  # (..., out, in / GROUP, GROUP)
    lowest, highest = groups.aminmax(dim=-1)
    # Rounded to bf16 first: the codes then make up for its error.
    scale = torch.where(highest > lowest, (highest - lowest) / 15, 1.0).bfloat16()
    offset = (lowest + 8 * scale.float()).bfloat16()
    codes = ((groups - offset.float()[..., None]) / scale.float()[..., None] + 8).round()
    return pack_nibbles(codes.clamp(0, 15).to(torch.uint8).flatten(-2)), scale, offset


def dequantize_groups(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """The matrix (..., out, in) in fp32."""
    groups = unpack_nibbles(codes).unflatten(-1, (-1, GROUP)).float()
    return ((groups - 8) * scale.float()[..., None] + offset.float()[..., None]).flatten(-2)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two codes in a byte, the first in its lower half: (..., in) to (..., in / 2).

    >>> pack_nibbles(torch.tensor([1, 2, 15, 0], dtype=torch.uint8)).tolist()
    [33, 15]
    >>> unpack_nibbles(torch.tensor([33, 15], dtype=torch.uint8)).tolist()
    [1, 2, 15, 0]
    """
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack_nibbles(codes: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def layout(shape: Sequence[int], bits: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The type and shape of each part of a matrix (..., out, in)."""
    *rows, n_in = shape
    if bits == 8:
        return {"codes": (torch.int8, (*rows, n_in)), "scales": (torch.bfloat16, tuple(rows))}
    per_group = (torch.bfloat16, (*rows, n_in // GROUP))
    return {
        "codes": (torch.uint8, (*rows, n_in // 2)),
        "scales": per_group,
        "offsets": per_group,
    }


def has_groups(shape: Sequence[int]) -> bool:
    """Whether the kernel of 4 bits multiplies by a matrix of this shape (..., out, in)."""
    n_out, n_in = shape[-2:]
    return n_out % 16 == 0 and n_in % GROUP == 0


def rounded(weight: Tensor, bits: int) -> Rounded:
    """A matrix in 4 bits, if its shape allows it, or 8."""
    if bits == 4 and has_groups(weight.shape):
        return quantize_groups(weight)
    return quantize_rows(weight)


def dequantize(matrix: Rounded) -> Tensor:
    """The matrix (..., out, in) in fp32."""
    return dequantize_rows(*matrix) if bits_of(matrix) == 8 else dequantize_groups(*matrix)


def rounded_names(model: Decoder) -> list[str]:
    """The weights that are rounded: all matrices but the embeddings and the router of a mixture."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, MixtureOfExperts):
            names += [f"{name}.up", f"{name}.down"]
        elif isinstance(module, nn.Linear) and not name.endswith(".router"):
            names.append(f"{name}.weight")
    return names


@torch.no_grad()
def rounded_matrices(model: Decoder, bits: int = 8) -> RoundedWeights:
    """The matrices of `model` in 8 or 4 bits."""
    return {name: rounded(model.get_parameter(name), bits) for name in rounded_names(model)}


def install(model: Decoder, matrices: Mapping[str, Rounded]) -> None:
    """Replace the matrices of `model` by `matrices`."""
    for name in rounded_names(model):
        if name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            bias = model.get_submodule(layer).bias
            model.set_submodule(layer, rounded_layer(matrices[name], bias))
        elif name.endswith(".up"):  # a mixture, with its .down
            layer = name.removesuffix(".up")
            mixture = model.get_submodule(layer)
            down = matrices[f"{layer}.down"]
            model.set_submodule(layer, RoundedExperts(mixture, matrices[name], down))
    if model.config.tie_embeddings:
        model.embedding.weight = nn.Parameter(dequantize(matrices["head.weight"]), False)


def dequantized(
    weights: Mapping[str, Tensor], matrices: Mapping[str, Rounded]
) -> dict[str, Tensor]:
    """All weights in fp32, with the rounded ones as their codes say.

    Args:
        weights: the others; without a tied embedding, which is the head's matrix.
    """
    full = {name: weight.float() for name, weight in weights.items()}
    full |= {name: dequantize(matrix) for name, matrix in matrices.items()}
    return {"embedding.weight": full["head.weight"]} | full


def quantize(model: Decoder, bits: int = 8) -> None:
    """Replace the matrices of `model` by matrices of 8 or 4 bits.

    Raises:
        UserError: see `rounding_problem`.
    """
    problem = rounding_problem(model.embedding.weight.device.type)
    if problem is not None:
        raise UserError(f"weights: int{bits}", problem, "Use --device cpu, or fp32 weights")
    install(model, rounded_matrices(model, bits))


def bits_of_model(model: nn.Module) -> int | None:
    """The bits of its matrices, the fewest where some have 8 and some 4; None: 16 or 32."""
    kinds = {type(module) for module in model.modules()}
    return 4 if Int4Linear in kinds else 8 if Int8Linear in kinds else None


def rounding_problem(device: str) -> str | None:
    """Why a device cannot compute in 8 or 4 bits; None if it can."""
    if device == "cpu" and torch.backends.mkldnn.is_available():
        return None
    return "8 and 4 bits are only supported on the CPU, with oneDNN"
