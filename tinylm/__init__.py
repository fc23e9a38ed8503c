"""Tiny Transformer's library: tokenizers, documents, rows, the decoder, losses,
checkpoints and sampling.

It knows torch and never Lightning; it returns values and never prints.
Read `tinylm/model/decoder.py` first. `tinylm.load("checkpoints/final.ckpt")` opens a model
(tinylm/generate/language_model.py), which is imported by the first call.
"""

import importlib
from os import PathLike
from typing import Any, Literal

__version__ = "0.2.0"


def load(
    path: str | PathLike[str],
    *,
    device: str = "auto",
    weights: Literal["fp32", "bf16", "int8", "int4"] | None = None,
    slots: int = 8,
    deterministic: bool = False,
) -> Any:
    """The model in a checkpoint, ready to generate: `tinylm.generate.language_model.load`, which
    explains the arguments, imported by the first call.
    """
    open_model = importlib.import_module("tinylm.generate.language_model").load
    return open_model(
        path, device=device, weights=weights, slots=slots, deterministic=deterministic
    )
