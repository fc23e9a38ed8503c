"""Text from a model. Read `engine` first: the decode loop, step by step.

`engine` and `chat` are imported at their first use, as `generate.engine`: most training runs do not
sample.
"""

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name in ("engine", "chat"):
        return importlib.import_module(f"tinylm.generate.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
