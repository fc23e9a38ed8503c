"""Tiny Transformer's library: tokenizers, documents, rows, the decoder, losses,
checkpoints and sampling.

It knows torch and never Lightning; it returns values and never prints.
Read `tinylm/model/decoder.py` first. `tinylm.load("checkpoints/final.ckpt")` opens a model
(tinylm/generate/language_model.py); it is imported at its first use.
"""

import importlib

__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    if name == "load":
        return importlib.import_module("tinylm.generate.language_model").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
