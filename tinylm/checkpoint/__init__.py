"""Checkpoints: their bytes (`format`, read it first), and from bytes to a model (`load`).

`initial` is imported at its first use, as `checkpoint.initial`:
most runs start from new weights or resume.
"""

from types import ModuleType

from tinylm.common.lazy import lazy_module


def __getattr__(name: str) -> ModuleType:
    return lazy_module(__name__, name, "initial")
