"""The models: `decoder` is ours, read it first.

`hf_model`, `hf_files` and `verifier` are imported at their first use, as `model.hf_files`:
most runs do not need a model of Hugging Face, or a verifier.
"""

from types import ModuleType

from tinylm.common.lazy import lazy_module


def __getattr__(name: str) -> ModuleType:
    return lazy_module(__name__, name, "hf_model", "hf_files", "verifier")
