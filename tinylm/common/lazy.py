"""Packages that import some of their modules at the first use:
a run then does not pay for what it does not need.
"""

import importlib
from types import ModuleType


def lazy_module(package: str, name: str, *names: str) -> ModuleType:
    """The module `name` of a package, for its `__getattr__`;
    the package has these `names` to import late.

    Raises:
        AttributeError: it is not one of `names`.
    """
    if name not in names:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return importlib.import_module(f"{package}.{name}")
