"""The number types of a GGUF file: which there are, and who rounds to them.

Most store a block of numbers of a row as small whole numbers and one or two factors. The `gguf`
package writes the plain ones; those with blocks of blocks ("K") only llama.cpp can make, from a
file in f32.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy import errstate
from torch import Tensor, from_numpy

from tinylm.common.errors import UserError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType


@dataclass(frozen=True)
class NumberType:
    """A type for the matrices of a GGUF file."""

    name: str
    file_type: str
    """its name in `gguf.LlamaFileType`"""
    block: int = 1
    """numbers of a row that are rounded together; rows must be multiples of it"""
    by_llama_cpp: bool = False
    """whether only llama.cpp rounds to it"""
    keeps_output: bool = False
    """whether the output matrix is q8_0 instead, as in llama.cpp: it suffers most"""


def _k_types() -> list[NumberType]:
    """Those of llama.cpp; the short names mean what they mean in its own tools."""
    names = ["q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"]
    full = {name: name for name in names} | {f"q{n}_k": f"q{n}_k_m" for n in (3, 4, 5)}
    return [
        NumberType(name, f"MOSTLY_{file_type.upper()}", block=256, by_llama_cpp=True)
        for name, file_type in full.items()
    ]


NUMBER_TYPES = {
    type.name: type
    for type in (
        NumberType("f32", "ALL_F32"),
        NumberType("f16", "MOSTLY_F16"),
        NumberType("bf16", "MOSTLY_BF16"),
        NumberType("q8_0", "MOSTLY_Q8_0", block=32),
        NumberType("q5_1", "MOSTLY_Q5_1", block=32, keeps_output=True),
        NumberType("q5_0", "MOSTLY_Q5_0", block=32, keeps_output=True),
        NumberType("q4_1", "MOSTLY_Q4_1", block=32, keeps_output=True),
        NumberType("q4_0", "MOSTLY_Q4_0", block=32, keeps_output=True),
        NumberType("mxfp4", "MOSTLY_MXFP4_MOE", block=32, keeps_output=True),
        *_k_types(),
    )
}

# Matrices that stay f32: they are small, and llama.cpp expects them so.
EXACT = ("position_embd.weight", "ffn_gate_inp.weight")


def is_rounded(name: str, weight: Tensor) -> bool:
    """Whether the type of the file applies to a tensor: to matrices, except the position embedding
    and the router of a mixture of experts. Norms and biases stay f32.
    """
    return weight.dim() > 1 and not name.endswith(EXACT)


def stored_type(type: NumberType, name: str, weight: Tensor, *, output: str) -> str:
    """The name of the type in which a tensor is stored; `output` is the name of the output matrix.

    >>> import torch
    >>> stored_type(NUMBER_TYPES["q4_0"], "output.weight", torch.ones(2, 32), output="output.weight")
    'Q8_0'
    """
    if not is_rounded(name, weight):
        return "F32"
    return "Q8_0" if type.keeps_output and name == output else type.name.upper()


def require_whole_blocks(where: object, type: NumberType, weights: dict[str, Tensor]) -> None:
    """Raise a UserError that names a tensor whose rows are not multiples of the type's block."""
    for name, weight in weights.items():
        n_columns = weight.size(-1)
        if is_rounded(name, weight) and n_columns % type.block:
            problem = (
                f"{type.name} rounds {type.block} numbers of a row together, "
                f"but the rows of {name} have {n_columns}"
            )
            others = "q8_0 or f16" if type.block > 32 and n_columns % 32 == 0 else "f16"
            raise UserError(where, problem, f"Export with --dtype {others}")


def rounded_array(weight: Tensor, stored: str) -> tuple[Any, GGMLQuantizationType]:
    """The bytes of a tensor in a GGUF file, and their type."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[stored]
    with errstate(over="ignore"):  # the caller checks that the numbers are finite
        return quants.quantize(weight.float().contiguous().numpy(), kind), kind


def exact_tensor(array: Any, kind: GGMLQuantizationType) -> Tensor:
    """The numbers that the bytes of a tensor mean, in fp32."""
    from gguf import quants

    return from_numpy(quants.dequantize(array, kind).astype("float32"))


def rounded(weight: Tensor, stored: str) -> Tensor:
    """The numbers of a tensor after rounding to a type."""
    return exact_tensor(*rounded_array(weight, stored))


def quantize_file(source: Path, target: Path, type: NumberType) -> None:
    """Write the f32 file `source` in another type, with llama.cpp.

    Raises:
        UserError: llama-cpp-python is not installed, or refuses.
    """
    require_llama_cpp(type)
    import llama_cpp
    from gguf import LlamaFileType

    llama_cpp.llama_log_set(_silent_log(), None)  # it prints a line for each tensor
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = LlamaFileType[type.file_type].value
    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), settings)
    if code:
        problem = f"llama.cpp could not quantize the file (its code is {code})"
        raise UserError(("--dtype", type.name), problem, "Export with --dtype q8_0")


@cache  # llama.cpp calls it until the end of the process
def _silent_log() -> Any:
    """A callback that prints nothing."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


def require_llama_cpp(type: NumberType) -> None:
    """Raise a UserError if only llama.cpp rounds to a type and it is not installed."""
    if type.by_llama_cpp and importlib.util.find_spec("llama_cpp") is None:
        problem = "only llama.cpp rounds to it, and llama-cpp-python is not installed"
        fix = "pip install llama-cpp-python, or export with --dtype q8_0"
        raise UserError(("--dtype", type.name), problem, fix)
