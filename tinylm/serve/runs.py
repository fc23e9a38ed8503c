"""The runs of a folder, for the page: a list, and the report of each.

    GET /runs           {"data": [{"name": "smoke", "stage": "pretrain", "status": "running", ...}]}
    GET /runs/NAME      report.html as of now

A name is looked up in the list; it never becomes a path of a file.
"""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.responses import HTMLResponse, JSONResponse, Response

from tinylm.common.errors import printable
from tinylm.runs.report import report_of
from tinylm.runs.run_folder import find_run_folders, read_run_folder, read_run_folders
from tinylm.serve.errors import ApiError

HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'; sandbox",
    "cache-control": "no-store",
}


def add_runs(app: FastAPI, folder: Path | None) -> None:
    """Add the routes for the runs in `folder` and below; without runs if it is None."""

    def name_of(path: Path) -> str:
        # A browser shortens /runs/. to /runs/; a file name may have bytes that are not UTF-8.
        return printable(folder.resolve().name if path == folder else path.relative_to(folder))

    # Not async: they read files, so they run in a thread beside the event loop.
    @app.get("/runs")
    def runs() -> Response:
        rows: list[dict[str, Any]] = []
        shown = ("stage", "status", "step", "max_steps", "best_val_loss", "updated")
        found = () if folder is None else read_run_folders(folder)
        for run in found:
            row = {key: getattr(run.facts, key) for key in shown}
            rows.append({"name": name_of(run.path)} | row)
        rows.sort(key=lambda row: -row["updated"])
        return JSONResponse({"data": rows})

    @app.get("/runs/{name:path}")
    def report(name: str) -> Response:
        for path in () if folder is None else find_run_folders(folder):
            if name_of(path) == name:
                return HTMLResponse(report_of(read_run_folder(path)), headers=HEADERS)
        raise ApiError(404, "There is no such run; GET /runs lists them.")
