"""bitsandbytes, an optional package, without the compiled code that it would download.

Where the package `kernels` is installed, bitsandbytes fetches kernels from a repository of the hub
and runs them: on a CPU with AVX512-BF16 as soon as it is imported, on a Mac at the first use.
peft imports it too, if it is installed.
"""

import sys
from types import ModuleType

from tinylm.common.errors import require_package

BITSANDBYTES = "bitsandbytes"


def import_bitsandbytes() -> ModuleType:
    """The package bitsandbytes.

    Raises:
        UserError: it is not installed.
    """
    require_package(BITSANDBYTES)
    block_downloads()
    import bitsandbytes

    return bitsandbytes


def block_downloads() -> None:
    """Make `import kernels` fail in this process, as if that package were not installed;
    bitsandbytes then computes with what its wheel has.
    """
    sys.modules["kernels"] = None  # type: ignore[assignment]
