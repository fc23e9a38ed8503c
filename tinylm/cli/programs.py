"""The programs beside the package, train.py and its like, as commands: `tinylm train`.

A program is imported by the name of its file from `app_folder()`, which is then the first folder
of `sys.path`: in this process alone, and in its workers, which inherit it.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tinylm.common.app_folder import app_folder


@dataclass(frozen=True)
class Program:
    """A command that is a program with a command line of its own."""

    name: str
    """its file, without .py"""
    SUMMARY: str
    flags: tuple[str, ...] = ()
    """given before what the user types"""
    texts: dict[str, str] = field(default_factory=dict)
    """of its help, if its name as a command is another one"""

    def main(self, words: Sequence[str]) -> int:
        """Run the program with these words and return its exit code."""
        return load_program(self.name).main([*self.flags, *words], **self.texts)


def load_program(name: str) -> Any:
    """The module of a program: `main(words)`, `parse(words)` and `run(arguments)`."""
    folder = str(app_folder())
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)
    return importlib.import_module(name)
