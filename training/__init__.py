"""Training under Lightning. Read `run` first: a run from top to bottom.

`tokenizer` is imported at its first use, as `training.tokenizer`:
a run whose tokenizer is not learned does not need it.
"""

from types import ModuleType

from tinylm.common.lazy import lazy_module


def __getattr__(name: str) -> ModuleType:
    return lazy_module(__name__, name, "tokenizer")
