"""The folder of a run, training.log_dir/training.run_name, and how it is read:

    metrics.csv     one row per logged step (metrics_csv.py)
    config.yaml     every setting; `train.py --config logs/RUN/config.yaml` runs it again
    run.json        `RunFacts`: stage, command, machine, progress, time, memory, log lines
    samples.jsonl   the samples of its validations: {"step": 100, "text": "⟦Once⟧ upon ..."}
    report.html     all of it as one page (report.py)

record.py writes all of them but metrics.csv. Training reads none of them.
"""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from tinylm.common.errors import UserError
from tinylm.common.files import read_regular
from tinylm.runs.metrics_csv import read_columns

CONFIG, FACTS, SAMPLES, REPORT = "config.yaml", "run.json", "samples.jsonl", "report.html"
RUNNING, COMPLETE, STOPPED, FAILED = "running", "complete", "stopped", "failed"
logger = logging.getLogger(__name__)

# Of a damaged file, no number that cannot be displayed as a time.
Seconds = Annotated[float, Field(ge=0, lt=1e11)]
Loss = Annotated[float, Field(allow_inf_nan=False)]


@dataclass
class RunFacts:
    """The content of run.json."""

    stage: str = ""
    run_name: str = ""
    status: str = RUNNING
    """running, complete, stopped (by a signal) or failed; a run that was killed stays running"""
    message: str = ""
    """the error that ended it"""
    step: int = 0
    max_steps: int = 0
    tokens: int = 0
    passes: float | None = None
    """over the training data"""
    best_val_loss: Loss | None = None
    best_step: int | None = None
    seconds: Seconds = 0.0
    """of all processes of the run, validations included; what was done between the last renewal
    and a kill is not in it"""
    began: Seconds = 0.0
    """seconds since 1970"""
    updated: Seconds = 0.0
    device: str = ""
    precision: str = ""
    model: str = ""
    """one line: parameters, FLOPs per token, tokens per step"""
    flops_per_token: int | None = None
    peak_bytes: int | None = None
    """memory of the process, or on a GPU of its tensors"""
    checkpoint_dir: str = ""
    settled: dict[str, str] = field(default_factory=dict)
    """settings that were settled before step 1, with what was given"""
    command: list[str] = field(default_factory=list)
    """the words of the command line"""
    versions: dict[str, str] = field(default_factory=dict)
    next_command: str = ""
    lines: list[str] = field(default_factory=list)
    """what the run logged: data, splits, truncation, warnings"""


_facts = TypeAdapter(RunFacts)


@dataclass(frozen=True)
class RunFolder:
    """What is known about a run from its folder."""

    path: Path
    facts: RunFacts
    columns: dict[str, list[float]]
    """of metrics.csv, NaN for empty cells"""
    samples: list[dict[str, Any]]
    settings: str
    """the text of config.yaml; empty for a run of an earlier version"""


def find_run_folders(root: Path) -> Iterator[Path]:
    """The folders of all runs in `root` and below, by name."""
    yield from sorted(path.parent for path in root.rglob("metrics.csv"))


def read_run_folders(root: Path) -> Iterator[RunFolder]:
    """All runs in `root` and below; one that cannot be read is a warning."""
    for path in find_run_folders(root):
        try:
            yield read_run_folder(path)
        except UserError as error:
            logger.warning("skipped: %s", error)


def read_run_folder(path: Path) -> RunFolder:
    """The run in a folder; what is missing or damaged in it is empty.

    Raises:
        UserError: metrics.csv cannot be read.
    """
    metrics = path / "metrics.csv"
    columns = read_columns(metrics) if metrics.exists() else {}
    facts = read_facts(path) or facts_of_metrics(path, columns)
    config = path / CONFIG
    settings = read_regular(config).decode(errors="replace") if config.is_file() else ""
    return RunFolder(path, facts, columns, read_samples(path), settings)


def read_facts(folder: Path) -> RunFacts | None:
    """The content of run.json; None if there is none or it is damaged."""
    if not (folder / FACTS).is_file():
        return None
    try:
        return _facts.validate_json(read_regular(folder / FACTS), strict=True)
    except (ValidationError, UserError):
        return None


def facts_of_metrics(folder: Path, columns: dict[str, list[float]]) -> RunFacts:
    """What metrics.csv alone says, for a run of an earlier version."""
    facts = RunFacts(run_name=folder.name, status="")
    facts.updated = (folder / "metrics.csv").stat().st_mtime if columns else 0.0
    steps = columns.get("step", [])
    if steps:
        facts.step = int(steps[-1])
        # Another program may have written the file: Lightning's CSVLogger uses the same name.
        tokens = columns.get("tokens", [0.0])[-1]
        facts.tokens = int(tokens) if math.isfinite(tokens) else 0
        losses = columns.get("val_loss", [math.nan] * len(steps))
        scored = [(loss, int(s)) for s, loss in zip(steps, losses, strict=True)]
        finite = [(loss, step) for loss, step in scored if math.isfinite(loss)]
        facts.best_val_loss, facts.best_step = min(finite, default=(None, None))
        passes = columns.get("passes", [])
        facts.passes = passes[-1] if passes else None
    return facts


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The rows of samples.jsonl, without a line that a crash cut."""
    path = folder / SAMPLES
    samples = []
    if path.is_file():
        try:
            content = read_regular(path)
        except UserError as error:
            logger.warning("skipped: %s", error)
            return []
        for line in content.decode(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                samples.append({"step": row["step"], "text": str(row.get("text"))})
    return samples
