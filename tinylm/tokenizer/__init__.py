"""Tokenizers: text to ids and back. Read `base` first, then `bpe`:
how merges are learned and applied.

`added`, `hf` and `hf_files` are imported at their first use, as `tokenizer.hf_files`:
bytes and characters need none of them.
"""

from types import ModuleType

from tinylm.common.lazy import lazy_module


def __getattr__(name: str) -> ModuleType:
    return lazy_module(__name__, name, "added", "hf", "hf_files")
