"""The console for result tables."""

import sys

from rich.console import Console


def results() -> Console:
    """Stdout for people: colored on a terminal that allows it, plain and wide in a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=200)
