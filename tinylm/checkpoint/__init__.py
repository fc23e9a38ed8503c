"""Checkpoints: their bytes (`format`, read it first), whether their content makes sense (`check`),
and from bytes to a model (`load`).

`check` and `initial` are imported at their first use, as `checkpoint.initial`:
most runs start from new weights.
"""

from types import ModuleType

from tinylm.common.lazy import lazy_module


def __getattr__(name: str) -> ModuleType:
    return lazy_module(__name__, name, "check", "initial")
