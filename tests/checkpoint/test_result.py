"""Which checkpoint a run ends with, and which one a folder stands for (K12)."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_checkpoint import make_state
from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint.info import info_of
from tinylm.checkpoint.result import link_final, model_folders, model_of_run


def run_state(step: int, losses: list[float], **training: Any) -> dict[str, Any]:
    """The state of a run that validated at steps 20, 40, ... with these losses."""
    state = make_state(step, val_loss=losses[-1])
    state["config"]["training"] |= training
    validations = [[20 * number, loss] for number, loss in enumerate(losses, start=1)]
    return state | {"progress": {"validations": validations}}


def write_run(folder: Path, losses: list[float], **training: Any) -> Path:
    """Step files at 20, 40, ... with best.ckpt; the path of the last one."""
    folder.mkdir(exist_ok=True)
    for number in range(1, len(losses) + 1):
        path = folder / f"step-{20 * number:06d}.ckpt"
        checkpoint_format.write(path, run_state(20 * number, losses[:number], **training))
        if losses[number - 1] == min(losses[:number]):
            checkpoint_format.link(path, "best.ckpt")
    return path


OVERFITTED = [4.0, 4.5, 4.7]


@pytest.mark.parametrize(("patience", "step"), [(None, 60), (1, 20)])
def test_a_run_ends_with_its_last_step_or_with_early_stopping_with_its_lowest_val_loss(
    tmp_path: Path, patience: int | None, step: int
) -> None:
    """Before, a stage started from best.ckpt: step 20 of 60, which could not answer (K12)."""
    settings = {"max_steps": 60, "early_stopping_patience": patience}
    last = write_run(tmp_path, OVERFITTED, **settings)
    final = link_final(last, patience)
    assert checkpoint_format.read(final)["step"] == step
    found = model_of_run(tmp_path)
    assert found is not None
    assert (found[0], found[1]["step"]) == (final, 60)


def test_early_stopping_without_a_best_checkpoint_ends_with_the_last_step(tmp_path: Path) -> None:
    """A branch that --resume began in another folder: its best step was before it."""
    last = write_run(tmp_path, OVERFITTED)
    (tmp_path / "best.ckpt").unlink()
    assert link_final(last, 1).samefile(last)


def test_a_run_that_continued_after_its_end_is_its_newest_step(tmp_path: Path) -> None:
    """final.ckpt of 40 steps is older than step 60 of 80."""
    write_run(tmp_path, OVERFITTED, max_steps=80)
    link_final(tmp_path / "step-000040.ckpt", None)
    found = model_of_run(tmp_path)
    assert found is not None
    assert found[0] == tmp_path / "step-000060.ckpt"


def test_the_summary_names_the_step_with_the_lowest_val_loss(tmp_path: Path) -> None:
    """Of equal losses the last, which is best.ckpt; NaN of older versions is not the lowest."""
    path = write_run(tmp_path, OVERFITTED)

    def summary(step: int, losses: list[float]) -> str:
        return info_of(path, run_state(step, losses)).summary()

    start = f"{path}, stage pretrain, step 60, val_loss "
    lowest = "; the lowest was 4.0000 at step {} (best.ckpt)"
    assert summary(60, OVERFITTED) == f"{start}4.7000{lowest.format(20)}"
    assert summary(60, [4.0, 4.0, 4.7]) == f"{start}4.7000{lowest.format(40)}"
    assert summary(60, [math.nan, 4.5, 4.0]) == f"{start}4.0000"
    assert info_of(path, make_state(3)).summary() == f"{path}, stage pretrain, step 3"


def test_folders_of_runs_are_found_below_a_folder(tmp_path: Path) -> None:
    assert model_folders(tmp_path) == []
    write_run(tmp_path / "b", [1.0])
    (tmp_path / "a").mkdir()
    write_run(tmp_path / "a" / "c", [1.0])
    assert model_folders(tmp_path) == [tmp_path / "a" / "c", tmp_path / "b"]
