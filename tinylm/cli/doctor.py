"""`python -m tinylm doctor`: what this machine can do, what is missing, and how to fix it."""

import argparse
import logging

from tinylm.common.errors import UserError
from tinylm.common.tables import Table, print_table

logger = logging.getLogger(__name__)

SUMMARY = "check this machine: versions, devices, disk, optional packages"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the help text; the command has no flags."""
    parser.usage = "python -m tinylm doctor"
    parser.description = (
        "Check this machine: versions, devices, precisions, disk, the Hugging Face hub, "
        "optional packages."
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a table of findings.

    Raises:
        UserError: something that training needs is missing.
    """
    from rich.text import Text

    from tinylm.planning.doctor import examine

    names = ("what", "found", "fix")
    rows = Table(names, text=names, fold=names)  # a narrow terminal must not shorten a fix
    missing = []
    for finding in examine():
        if finding.fix is None:
            style = ""
        elif finding.required:
            style = "red"
            missing.append(finding.subject)
        else:
            style = "yellow"
        rows.add_row(finding.subject, Text(finding.found, style), finding.fix or "")
    print_table(rows)
    if missing:
        raise UserError(
            "missing",
            ", ".join(missing),
            "Follow the table, or: pip install -r requirements.txt",
        )
    logger.info(
        "everything that training needs is here; next: python train.py --config config_smoke.yaml"
    )
    return 0
