"""Text from a model. Read `engine` first: the decode loop, step by step.

`engine` and `chat` are imported at their first use, as `generate.engine`: most training runs do not
sample.
"""

from types import ModuleType

from tinylm.common.lazy import lazy_module


def __getattr__(name: str) -> ModuleType:
    return lazy_module(__name__, name, "engine", "chat")
