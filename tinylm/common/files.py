"""Files that are there whole or not at all, also after a kill or a power cut."""

import os
from pathlib import Path

from tinylm.common.errors import writing


def write_whole(path: Path, text: str, setting: str) -> None:
    """Write a text file so that its name never stands for half of it; its folder is made where there is none.

    Raises:
        UserError: it cannot be written; the message names `setting`, which its place came from.
    """
    with writing(path, setting):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())


def replace_file(path: Path, content: bytes) -> None:
    """Give the name `path` to these bytes once they are on the disk; nobody else may write it at the same time."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """Make a rename in it survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
