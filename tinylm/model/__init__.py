"""The models: `decoder` is ours, read it first.

`hf_model` is imported at its first use, as `model.hf_model`: most runs do not need a model of Hugging Face.
"""

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name == "hf_model":
        return importlib.import_module("tinylm.model.hf_model")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
