"""`python -m tinylm config-reference`: write the reference of all settings,
and their JSON schema.
"""

import argparse
from pathlib import Path

from tinylm.common.errors import UserError
from tinylm.common.files import read_regular

SUMMARY = "write the reference of all settings and their JSON schema for editors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.usage = "python -m tinylm config-reference [--folder FOLDER] [--check]"
    parser.description = "Write the reference of all settings and their JSON schema for editors."
    parser.add_argument(
        "--folder", type=Path, default=Path("docs"), help="folder of the two files (default: docs)"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; fail if a file does not match the settings",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write or check both files and print their paths."""
    from tinylm.config.docs import reference_files

    fix = "Give the folder of the reference with --folder"
    for name, text in reference_files().items():
        path = arguments.folder / name
        try:
            if not arguments.check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8", newline="\n")
            is_stale = read_regular(path) != text.encode()
        except UserError as error:
            raise error.within(fix=fix) from None
        except OSError as error:
            raise UserError(path, error.strerror, fix) from None
        if is_stale:
            raise UserError(
                path,
                "does not match the settings in tinylm/config/",
                "Write it again: python -m tinylm config-reference",
            )
        print(path)
    return 0
