"""Packages that import some of their modules at the first use:
a run then does not pay for what it does not need.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any


def lazy_module(package: str, name: str, *names: str) -> ModuleType:
    """The module `name` of a package, for its `__getattr__`;
    the package has these `names` to import late.

    Raises:
        AttributeError: it is not one of `names`.
    """
    if name not in names:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return importlib.import_module(f"{package}.{name}")


def postpone(package: str, **stand_ins: Any) -> None:
    """Let `import package` cost nothing until another name of it is used than those of `stand_ins`.

    The stand-ins and `__version__` are there at once. Any other name runs the package's own code,
    which replaces them; its modules can be imported as ever. Nothing happens if it is loaded
    already, or is not installed.
    """
    from importlib.metadata import version  # not for `--help`, of which it would take a quarter

    spec = None if package in sys.modules else importlib.util.find_spec(package)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)  # found, and not run

    def run_and_get(name: str) -> Any:
        if name.startswith("__") or module.__dict__.pop("__getattr__", None) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        spec.loader.exec_module(module)
        return getattr(module, name)

    vars(module).update(stand_ins, __version__=version(package), __getattr__=run_and_get)
    sys.modules[package] = module
