"""Text from a model. Read `engine` first: the decode loop, step by step.

`engine` is imported at its first use, as `generate.engine`: most training runs do not sample.
"""

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name == "engine":
        return importlib.import_module("tinylm.generate.engine")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
