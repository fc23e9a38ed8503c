"""Rows for fine-tuning: questions with answers, from a file to tokens. Read `skipped_rows` first:
the path of a row.

`template_factory` is imported at its first use, as `rows.template_factory`:
pretraining needs no template.
"""

from types import ModuleType

from tinylm.common.lazy import lazy_module


def __getattr__(name: str) -> ModuleType:
    return lazy_module(__name__, name, "template_factory")
