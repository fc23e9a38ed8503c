"""The frozen base of adapters in 4 bits: NF4 (Dettmers et al. 2023, arXiv:2305.14314, QLoRA).

    W (out, in) ─▶ blocks of 64 weights ─▶ each divided by its largest |w| ─▶ the nearest of 16 numbers

The 16 numbers are quantiles of a normal distribution, which weights are close to. A weight takes
half a byte, and a sixteenth of one for its block. Each product expands its matrix again, in the
precision of the run, for as long as it takes.

`quantize` is called before adapters are put into a base. They learn beside the rounded weights, so
`round_weights` gives a base these numbers again before an adapter is merged into it. bitsandbytes
does both, on the CPU; no weight of the base is ever saved in this form.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from tinylm.common.bnb import import_bitsandbytes


def quantize(model: nn.Module, names: Iterable[str], dtype: torch.dtype | None) -> None:
    """Replace these linear layers of `model`, one after the other, by frozen ones in NF4 that
    compute in `dtype`; None: fp32.
    """
    nn_4bit = import_bitsandbytes().nn
    for name in names:
        layer = model.get_submodule(name)
        matrix = weight_matrix(layer)
        new = nn_4bit.Linear4bit(
            *(matrix.size(1), matrix.size(0), layer.bias is not None),
            compute_dtype=dtype or torch.float32,
            device="meta",
        )
        settings = {"quant_type": "nf4", "compress_statistics": False, "module": new}
        weight = nn_4bit.Params4bit(matrix.detach().contiguous(), requires_grad=False, **settings)
        new.weight = weight.to(matrix.device)  # which rounds it
        new.bias = layer.bias
        # else the first validation would change its weights into another layout, rounded to bf16
        new.support_avx512bf16_for_cpu = False
        model.set_submodule(name, new)
    # what peft asks a model for
    model.is_loaded_in_4bit = True


@torch.no_grad()
def round_weights(layers: Mapping[str, nn.Module]) -> None:
    """Give linear layers the weights that they have after `quantize`, in fp32."""
    functional = import_bitsandbytes().functional
    for layer in layers.values():
        matrix = weight_matrix(layer)
        codes, state = functional.quantize_4bit(
            matrix.contiguous(), compress_statistics=False, quant_type="nf4"
        )
        matrix.copy_(functional.dequantize_4bit(codes, state))


def weight_matrix(layer: nn.Module) -> Tensor:
    """The matrix (out, in) of a linear layer, not a copy: GPT-2's Conv1D stores (in, out)."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight if isinstance(layer, nn.Linear) else layer.weight.T


def block_scales(model: nn.Module) -> Iterator[Tensor]:
    """The largest |w| of each block, which are neither weights nor buffers of the module."""
    linear_4bit = import_bitsandbytes().nn.Linear4bit
    for layer in model.modules():
        if isinstance(layer, linear_4bit):
            yield layer.weight.quant_state.absmax
