"""Running the stages of align.py, each as a process of its own; finished stages are not run again.

Each stage resumes exactly, because its program does. state.json remembers the settings of every
stage and the fingerprints of the weights that it began with and that it produced, so that a changed
stage, or one whose base has changed, is noticed.
"""

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylm.checkpoint.format import candidates
from tinylm.checkpoint.initial import weights_fingerprint
from tinylm.common.child_program import ChildProgram
from tinylm.common.console import duration
from tinylm.common.errors import UserError
from tinylm.common.files import read_regular, write_atomic
from tinylm.common.platform import signal_name
from training.pipeline import PROGRAMS, PipelineStage

logger = logging.getLogger(__name__)
HERE = Path(__file__).parent.parent
# Exit codes that the same command gives again: a mistake in the settings, and a diverged loss.
NEEDS_A_CHANGE = (2, 3)


@dataclass(frozen=True)
class StageRecord:
    """What state.json remembers of a stage that was started."""

    settings: dict[str, Any]
    bases: dict[str, str]
    """fingerprint of the weights of each checkpoint that it reads, by path"""
    result: str | None
    """fingerprint of the weights that it produced; None until it has finished"""


class PipelineState:
    """state.json: the stages that were started and finished."""

    def __init__(self, path: Path, stages: dict[str, StageRecord]):
        self.path = path
        self.stages = stages

    @classmethod
    def read(cls, path: Path) -> "PipelineState":
        """The state in a file; an empty one if there is none.

        Raises:
            UserError: the file is not one that `record` wrote.
        """
        if not path.exists():
            return cls(path, {})
        try:
            stored = json.loads(read_regular(path))
            return cls(path, {name: StageRecord(**record) for name, record in stored.items()})
        except (ValueError, TypeError, AttributeError):
            raise UserError(
                path,
                "was not written by align.py",
                "Delete it: finished stages are found again by their checkpoints",
            ) from None

    def record(self, name: str, record: StageRecord) -> None:
        """Remember a stage."""
        self.stages[name] = record
        write_atomic(self.path, self._text(self.stages), "--out")

    def digest(self, names: Iterable[str]) -> str:
        """Identifies the weights of these stages;
        stages that are no longer in the list do not count.
        """
        return hashlib.sha256(self._text(names).encode()).hexdigest()

    def _text(self, names: Iterable[str]) -> str:
        return json.dumps({name: vars(self.stages[name]) for name in names}, indent=2) + "\n"


def run_stages(stages: list[PipelineStage], state: PipelineState, child: ChildProgram) -> int:
    """Run each stage that is not finished; returns 0, or the exit code of the stage that failed.

    Raises:
        UserError: as `is_done`; or a stage is complete but the checkpoint to take from it is gone.
    """
    for number, stage in enumerate(stages, start=1):
        if child.received is not None:
            break
        title = f"stage {number} of {len(stages)}, {stage.name}"
        started = StageRecord(
            stage.config.to_plain(), {base: fingerprint(base) for base in stage.bases}, None
        )
        if is_done(stage, started, state):
            logger.info("%s: already done (%s)", title, stage.model)
            continue
        if stage.name not in state.stages and started.bases and candidates(stage.folder):
            logger.info(
                "note: %s has checkpoints from before; assuming that they began with %s as it is "
                "now",
                stage.folder,
                " and ".join(started.bases),
            )
        state.record(stage.name, started)
        code = _run(stage, title, child)
        if code:
            return code
        if not stage.model.exists():
            raise UserError(
                stage.model,
                f"not found, although stage {stage.name} is complete",
                f"Restore it, or remove {stage.folder} to run the stage again",
            )
        produced = fingerprint(str(stage.model))
        state.record(stage.name, StageRecord(started.settings, started.bases, produced))
    if child.received is not None:
        logger.info(
            "stopped by %s between two stages; the same command continues there",
            signal_name(child.received),
        )
        return 128 + child.received
    return 0


def _run(stage: PipelineStage, title: str, child: ChildProgram) -> int:
    """Run one stage in a process of its own and return its exit code."""
    logger.info("%s: %s", title, " ".join(stage.command))
    # The stages after it are next.
    command = [sys.executable, str(HERE / PROGRAMS[stage.kind]), *stage.command[2:], "--no-next"]
    start, used = time.monotonic(), processor_seconds()
    code = child.run(command, stdout=2, stderr=None)
    logger.info(
        "%s: %s, %s of processor time",
        title,
        duration(time.monotonic() - start),
        duration(processor_seconds() - used),
    )
    if code:
        when = "after you have changed that, " if code in NEEDS_A_CHANGE else ""
        logger.info(
            "%s: exit code %d. Its checkpoints are kept; %sthe same command continues there",
            title,
            code,
            when,
        )
    return code


def processor_seconds() -> float:
    """Of all child processes that have ended: on a busy machine, time on the clock says little."""
    times = os.times()
    return times.children_user + times.children_system


def is_done(stage: PipelineStage, started: StageRecord, state: PipelineState) -> bool:
    """Whether the stage was finished with these settings and bases, and its result is still there.

    Raises:
        UserError: it was started from other weights than its bases have now.
    """
    known = state.stages.get(stage.name)
    if known is None or not candidates(stage.folder):
        return False
    for base, now in started.bases.items():
        before = known.bases.get(base, now)
        if before != now:
            raise UserError(
                base,
                f"has weights {now} now, but had {before} when stage {stage.name} began with it",
                f"Restore it, or remove {stage.folder} to run the stage again",
            )
    if known.settings != started.settings or known.bases != started.bases:
        return False
    if known.result is None or not stage.model.exists():
        return False
    return fingerprint(str(stage.model)) == known.result


def fingerprint(path: str) -> str:
    """Identifies the weights of a checkpoint."""
    return weights_fingerprint(Path(path))
