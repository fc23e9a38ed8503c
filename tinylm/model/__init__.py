"""The models: `decoder` is ours, read it first.

`hf_files` is imported at its first use, as `model.hf_files`: most runs do not need a model of Hugging Face.
"""

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name == "hf_files":
        return importlib.import_module("tinylm.model.hf_files")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
