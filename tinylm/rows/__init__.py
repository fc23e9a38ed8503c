"""Rows for fine-tuning: questions with answers, from a file to tokens. Read `skipped_rows` first: the path of a row.

`template_factory` is imported at its first use, as `rows.template_factory`: pretraining needs no template.
"""

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name == "template_factory":
        return importlib.import_module("tinylm.rows.template_factory")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
