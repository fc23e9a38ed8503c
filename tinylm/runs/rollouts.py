"""rollouts.jsonl: every answer of its own that a model was trained on, a line each.

    {"step": 1, "row": "rows.jsonl:7", "prompt": "2+2=", "answer": "4", "target": "4",
     "reward": 1.0, "rewards": {"same_number": 1.0}, "tokens": 2, "truncated": false}

`step` is the first optimizer step that the answer is trained in. Distillation has no rewards. A
resumed run removes the lines of steps that it takes again, so that the file is equal to that of a run
that was never interrupted.
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tinylm.common.files import read_regular, writing

logger = logging.getLogger(__name__)

ROLLOUTS = "rollouts.jsonl"


class RolloutsFile:
    """rollouts.jsonl of one run.

    Args:
        path: the file; its folder is created.
        last_step: the step that the run continues from; lines of later steps are removed.
        keep_old: rename an existing file, which belongs to another run.
        hold: called before each write: takes the folder's lock again if the folder was removed.
    """

    def __init__(
        self,
        path: Path,
        last_step: int,
        *,
        keep_old: bool,
        hold: Callable[[], object] = lambda: None,
    ):
        self.path, self.hold = path, hold
        with writing(path, "training.log_dir"):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                return
            kept = _lines_until(path, last_step)
            if keep_old:
                os.replace(path, _free_name(path))
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(kept)
            os.replace(temporary, path)

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add lines, which are on the disk afterwards: a checkpoint that is saved later must not
        be ahead of the file.
        """
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with writing(self.path, "training.log_dir"):
            self.hold()
            with open(self.path, "ab") as file:
                # errors="replace": a lone surrogate in a text
                file.write(lines.encode("utf-8", errors="replace"))
                file.flush()
                os.fsync(file.fileno())


def _lines_until(path: Path, step: int) -> bytes:
    """The whole lines of steps up to `step`; the last line of a killed process may be partial."""
    kept = []
    for line in read_regular(path).splitlines(keepends=True):
        try:
            row = json.loads(line)
            if line.endswith(b"\n") and row["step"] <= step:
                kept.append(line)
        except (ValueError, LookupError, TypeError):
            logger.warning(f"{path}: a damaged line was removed")
    return b"".join(kept)


def _free_name(path: Path) -> Path:
    number = 1
    while (free := path.with_name(f"rollouts.{number}.jsonl")).exists():
        number += 1
    return free
