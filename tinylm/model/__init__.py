"""The models: `decoder` is ours, read it first.

The modules that `__getattr__` names are imported at their first use, as `model.hf_files`: most runs do
not need a model of Hugging Face, weights in 8 bits, a cache, a scaled context, a reward model or a
verifier.
"""

from types import ModuleType

from tinylm.common.lazy import lazy_module


def __getattr__(name: str) -> ModuleType:
    names = (
        "growth",
        "hf_model",
        "hf_files",
        "kv_cache",
        "reward_model",
        "rope_scaling",
        "rounded",
        "verifier",
    )
    return lazy_module(__name__, name, *names)
