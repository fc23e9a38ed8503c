"""Checkpoints: `format` is the file, `load` turns it back into a model.

`load` is imported at its first use, as `checkpoint.load`: it needs Hugging Face models, adapters and verifiers, which a
run that begins with new weights does not.
"""

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name == "load":
        return importlib.import_module("tinylm.checkpoint.load")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
