"""Small files that are there whole or not at all."""

import os
from pathlib import Path

from tinylm.errors import writing


def write_whole(path: Path, text: str, setting: str) -> None:
    """Write a text file so that its name never stands for half of it; its folder is made where there is none.

    Raises:
        UserError: it cannot be written; the message names `setting`, which its place came from.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path, setting):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
