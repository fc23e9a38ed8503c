"""Tiny Transformer's library: tokenizers, documents, rows, the decoder, losses,
checkpoints and sampling.

It knows torch and never Lightning; it returns values and never prints.
Read `tinylm/model/decoder.py` first. `tinylm.load("checkpoints/final.ckpt")` opens a model
(tinylm/generate/language_model.py), which is imported by the first call.
"""

import importlib
from os import PathLike
from typing import Any

__version__ = "0.2.0"


def load(path: str | PathLike[str], **settings: Any) -> Any:
    """The model in a checkpoint, ready to generate; `settings` are device, weights, slots and
    deterministic, as `tinylm.generate.language_model.load` explains them.
    """
    return importlib.import_module("tinylm.generate.language_model").load(path, **settings)
