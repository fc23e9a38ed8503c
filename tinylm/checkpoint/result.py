"""Which checkpoint is the model that a run ends with: one rule, for the end of a run, for the stage
that starts from it, and for the programs that open a folder.

    final.ckpt   the last step; if training.early_stopping_patience is set, val_loss decides, and it
                 is the step with the lowest one: best.ckpt

The lowest val_loss alone does not decide: over few validation rows it is often that of a model that
has just begun to learn the answers (docs/LOG.md, "The lowest val_loss").

    link_final      gives a complete run its final.ckpt            training/
    model_of_run    final.ckpt, or the newest step of a run that is not complete
    model_folders   the folders of runs below a folder
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tinylm.checkpoint.format import latest_state, link
from tinylm.common.errors import DamagedError
from tinylm.optim.schedule import should_stop

FINAL = "final.ckpt"


def link_final(last: Path, patience: int | None) -> Path:
    """Give the run whose last checkpoint is `last` its final.ckpt.

    Args:
        last: the newest step file.
        patience: training.early_stopping_patience.
    """
    best = last.with_name("best.ckpt")
    return link(best if patience is not None and best.exists() else last, FINAL)


def is_complete(
    step: int, max_steps: int, val_losses: Sequence[float], patience: int | None
) -> bool:
    """Whether nothing is left to train: all steps are done, or the run stopped early."""
    return step >= max_steps or should_stop(val_losses, patience)


def model_of_run(
    folder: Path, on_damaged: Callable[[DamagedError], None] = lambda error: None
) -> tuple[Path, dict[str, Any]] | None:
    """The model of the run in `folder`, and the state of the newest checkpoint; None if there is
    no checkpoint.

    Raises:
        UserError: as `latest_state`.
    """
    found = latest_state(folder, on_damaged)
    if found is None:
        return None
    newest, state = found
    final = folder / FINAL
    if final.exists() and (final.samefile(newest) or _was_completed(state)):
        return final, state
    return found


def _was_completed(state: dict[str, Any]) -> bool:
    """Whether a run ended with this state; an imported model is of no run."""
    if "progress" not in state:
        return False
    training = state["config"]["training"]
    losses = [loss for _, loss in state["progress"]["validations"]]
    patience = training["early_stopping_patience"]
    return is_complete(state["step"], training["max_steps"], losses, patience)


def model_folders(folder: Path) -> list[Path]:
    """The folders with checkpoints, `folder` itself and all below it, sorted by path."""
    return sorted({path.parent for path in folder.rglob("*.ckpt")})
