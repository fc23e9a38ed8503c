"""Writes the report of a run and its data into the run's folder (run_folder.py): at each validation
and at its end. Of a long run the report may wait for a later validation, see `REPORT_SHARE`.
A file that cannot be written is a warning, and the run continues: nothing here ends a run.
"""

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# config.yaml_text is imported at the first validation
from tinylm import config as settings
from tinylm.common.console import LOGGERS, as_typed
from tinylm.common.errors import UserError
from tinylm.common.files import write_atomic
from tinylm.config.schema import Config
from tinylm.planning.memory import peak_bytes
from tinylm.runs.report import report_of
from tinylm.runs.run_folder import (
    CONFIG,
    FACTS,
    FAILED,
    REPORT,
    RUNNING,
    SAMPLES,
    RunFacts,
    read_facts,
    read_run_folder,
    read_samples,
)

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "lightning", "transformers", "numpy")
# A run that logs more repeats itself.
MAX_LINES = 200
# Each report reads all of metrics.csv: 1.4 s at 100,000 rows. One that takes longer than this is
# renewed so seldom that reports take at most this share of the time.
LONG_REPORT = 0.2  # seconds
REPORT_SHARE = 0.02


class RunRecord(logging.Handler):
    """Keeps the files of one run; inside its `with` block it collects what the run logs.

    Args:
        folder: log_dir of the run; None on ranks other than 0, which write nothing.
        facts: what is known before the run; the caller keeps its progress current.
        hold: called before each write, see `MetricsFile`.
    """

    def __init__(
        self,
        folder: Path | None = None,
        facts: RunFacts | None = None,
        hold: Callable[[], object] = lambda: None,
    ):
        super().__init__()
        self.folder, self.facts, self.hold = folder, facts or RunFacts(), hold
        self.samples: list[dict[str, Any]] = []
        self.sample_listeners: list[Callable[[str, int], None]] = []
        self._config: Config | None = None
        self._config_text = ""
        self._started: float | None = None  # when training did
        self._seconds_before = 0.0
        self._report_due = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Collect a line."""
        if len(self.facts.lines) < MAX_LINES:
            self.facts.lines.append(record.getMessage())

    def __enter__(self) -> Self:
        for name in LOGGERS:
            logging.getLogger(name).addHandler(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Record the error that ended the run."""
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(self)
        if error is not None:
            self.end(FAILED, str(error) or type(error).__name__)

    def start(self, config: Config, step: int, *, is_new: bool) -> None:
        """Training starts from `step`; the files are written from the first validation on.

        Args:
            is_new: whether the files in the folder belong to another run.
        """
        if self.folder is None:
            return
        facts = self.facts
        facts.step, facts.max_steps = step, config.training.max_steps
        facts.began = time.time()
        self._config = config
        if not is_new:
            self.samples = [row for row in read_samples(self.folder) if row["step"] <= step]
            before = read_facts(self.folder)
            if before is not None:
                facts.began, self._seconds_before = before.began, before.seconds
        self._started = time.monotonic()

    def add_sample(self, step: int, text: str) -> None:
        """Keep the sample of a validation; that of an earlier process is replaced."""
        self.samples = [row for row in self.samples if row["step"] < step]
        self.samples.append({"step": step, "text": text})
        for listen in self.sample_listeners:
            listen(text, step)

    def renew(self) -> None:
        """Write the files as of now."""
        if self.folder is None or self._started is None or self._config is None:
            return
        try:
            self._renew(self.folder, self._config, self._started)
        except Exception as error:  # a mistake in the report must not end the run
            logger.warning(f"warning: the report was not written: {type(error).__name__}: {error}")

    def _renew(self, folder: Path, config: Config, started: float) -> None:
        if not self._config_text:
            settled = self.facts.settled.items()
            notes = [f"# {name}: {given} was settled\n" for name, given in settled]
            self._config_text = "".join(notes) + settings.yaml_text.config_text(config)
        self._write(CONFIG, self._config_text)
        self.facts.command = command_line()
        self.facts.versions = environment()
        self.facts.updated = time.time()
        self.facts.seconds = self._seconds_before + time.monotonic() - started
        self.facts.peak_bytes = peak_bytes(self.facts.device)
        lines = [json.dumps(row, ensure_ascii=False) for row in self.samples]
        self._write(SAMPLES, "".join(f"{line}\n" for line in lines))
        self._write(FACTS, json.dumps(asdict(self.facts), indent=1, ensure_ascii=False))
        if self.facts.status == RUNNING and time.monotonic() < self._report_due:
            return
        began = time.thread_time()
        self._write(REPORT, report_of(read_run_folder(folder)))
        took = time.thread_time() - began
        self._report_due = time.monotonic() + (took / REPORT_SHARE if took > LONG_REPORT else 0)

    def end(self, status: str, message: str = "", next_command: str = "") -> None:
        """Write the files for the last time."""
        self.facts.status, self.facts.message = status, message
        self.facts.next_command = as_typed(next_command)
        self.renew()
        self._started = None

    def _write(self, name: str, content: str) -> None:
        assert self.folder is not None
        try:
            self.hold()
            # errors="replace": a lone surrogate in a text
            encoded = content.encode("utf-8", errors="replace")
            write_atomic(self.folder / name, encoded, "training.log_dir")
        except UserError as error:
            logger.warning(f"warning: {error}")


def command_line() -> list[str]:
    """The words of the command that started this process, as a user types them."""
    program = os.path.basename(sys.argv[0])
    if program == "__main__.py":
        return ["python", "-m", "tinylm", *sys.argv[1:]]
    start = ["python"] if program.endswith(".py") else []
    return [*start, program, *sys.argv[1:]]


@cache
def environment() -> dict[str, str]:
    """The versions and the machine that a result depends on."""
    found = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": str(os.cpu_count()),
    }
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
