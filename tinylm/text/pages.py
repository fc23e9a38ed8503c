"""The text of an HTML page: what its author wrote, without menus, advertisements and scripts.

By trafilatura (Barbaresi 2021), which FineWeb uses too. It is an optional package.
"""

import logging
from pathlib import Path
from typing import Any

from tinylm.common.errors import import_optional

# lxml has given its cleaner to a package of its own, which trafilatura does not always bring.
TRAFILATURA = "trafilatura lxml_html_clean"


def page_text(path: Path, raw: bytes) -> str:
    """The main text of a page; "" if there is none.

    Args:
        path: the name of the file, for errors.
        raw: its bytes, in the encoding that they declare.

    Raises:
        UserError: trafilatura is not installed.
    """
    if not raw.strip():
        return ""
    return _trafilatura(path).extract(raw, include_comments=False) or ""


def _trafilatura(path: Path) -> Any:
    module = import_optional("trafilatura", path, TRAFILATURA)
    # It logs every page without text as an error; which they are is said once, for all of them.
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
    return module


def extractor(path: Path) -> str:
    """The program that decides the text of a page and its version, for fingerprints."""
    return f"trafilatura {_trafilatura(path).__version__}"
