"""The settings. Read `schema` first: every setting, then `loader`.

`yaml_text`, `duration` and `depth` are imported at their first use, as `config.yaml_text`: most runs
only read settings, most lengths are a number of steps, and most shapes are written out.
"""

from types import ModuleType

from tinylm.common.lazy import lazy_module


def __getattr__(name: str) -> ModuleType:
    return lazy_module(__name__, name, "yaml_text", "duration", "depth")
