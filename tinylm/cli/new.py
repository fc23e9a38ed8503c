"""`tinylm new`: a project folder with configs, small data and test questions."""

import argparse
import logging
import os
import shlex
from pathlib import Path

from tinylm.common.app_folder import app_folder
from tinylm.common.console import as_typed
from tinylm.common.errors import UserError, printable
from tinylm.common.files import read_regular, write_atomic, writing

logger = logging.getLogger(__name__)

SUMMARY = "make a folder to train in: configs, a small text, test questions"
# Patterns in `app_folder()`. Other configs are copied to the same place.
COPIED = (
    "config_smoke.yaml",
    "config_finetune.yaml",
    "cases/*.yaml",
    "configs/**/*.yaml",
    "data/tiny_*",
)
OWN_CONFIG = Path("configs/new/config.yaml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.usage = "python -m tinylm new FOLDER"
    parser.description = (
        "Make a folder to train in: config.yaml, a commented config of your own; config_smoke.yaml "
        "and config_finetune.yaml, which run as they are; presets in configs/, small data in data/, "
        "test questions in cases/."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the new folder")


def run(arguments: argparse.Namespace) -> int:
    """Write the files that are not there yet, and print the path of the folder.

    Raises:
        UserError: a file of that name has other content, or cannot be written.
    """
    folder = arguments.folder
    files = {folder / name: content for name, content in project_files().items()}
    for path, content in files.items():
        if os.path.lexists(path) and read_regular(path) != content:
            raise UserError(path, "already exists, with other content", "Choose another folder")
    for path, content in files.items():
        with writing(path, "FOLDER"):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content, "FOLDER")
    there = "" if folder.resolve() == Path.cwd() else f"cd {shlex.quote(str(folder))} && "
    logger.info("next: %spython -m tinylm train --config config_smoke.yaml", there)
    print(printable(folder))
    return 0


def project_files() -> dict[Path, bytes]:
    """The content of each file of a new folder; the commands in a config are written as
    the user types them.
    """
    app, files = app_folder(), {}
    for pattern in COPIED:
        for source in sorted(app.glob(pattern)):
            name, content = source.relative_to(app), read_regular(source)
            if source.suffix == ".yaml":
                content = as_typed(content.decode("utf-8")).encode("utf-8")
            files[Path("config.yaml") if name == OWN_CONFIG else name] = content
    return files
