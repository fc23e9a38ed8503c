"""The files of the page: a table, so that no path of a request ever becomes a path of a file."""

import base64
import hashlib
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import Response

from tinylm.runs.report import STYLE

FOLDER = Path(__file__).parent / "page"
# The path of a request: file in `page/`, type.
FILES = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/api.js": ("api.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/vendor/marked.js": ("vendor/marked.js", "text/javascript"),
    "/vendor/purify.js": ("vendor/purify.js", "text/javascript"),
    "/vendor/LICENSES.txt": ("vendor/LICENSES.txt", "text/plain"),
}
# The page shows the report of a run in a frame that has the policy of the page: no script runs in
# it, and of all inline styles only the report's own is allowed.
REPORT_STYLE = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; "
    f"style-src 'self' 'sha256-{REPORT_STYLE}'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "cache-control": "no-cache",
}


def add_pages(app: FastAPI, files: dict[str, tuple[str, str]], folder: Path = FOLDER) -> None:
    """Answer GET for each of the files; they are read once, now."""
    for path, (name, kind) in files.items():
        content = (folder / name).read_bytes()  # our own file

        def page(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind, headers=HEADERS)

        app.add_route(path, lambda request, page=page: page(), methods=["GET"])
