"""Update rules and schedules. Read `optimizers` first.

`adamw_8bit` is imported at its first use, as `optim.adamw_8bit`: most runs keep their moments in fp32.
"""

from types import ModuleType

from tinylm.common.lazy import lazy_module


def __getattr__(name: str) -> ModuleType:
    return lazy_module(__name__, name, "adamw_8bit")
