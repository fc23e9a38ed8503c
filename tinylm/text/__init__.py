"""What is read, before any token. Read `sources` first.

`hub_dataset`, `compression` and the readers of formats that few runs read are imported at their
first use, as `text.hub_dataset`.
"""

from types import ModuleType

from tinylm.common.lazy import lazy_module


def __getattr__(name: str) -> ModuleType:
    readers = ("compression", "csv_files", "json_files", "pages", "parquet_files")
    return lazy_module(__name__, name, "hub_dataset", *readers)
