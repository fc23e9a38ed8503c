"""The console for result tables."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def results() -> "Console":
    """Stdout for people: colored on a terminal that allows it, plain and wide in a pipe."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=200)
