"""Worker processes that make batches: killed, hanging, or with an error (FAULTS C5)."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from torch.utils.data import get_worker_info

import tinylm.tokens.workers
import train
from tinylm.tokens.packing import RowDataset
from training.callbacks import StepEnd


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run_with_one_line(make_config, capsys, monkeypatch):
    after_step = StepEnd.after_step
    others = {child.pid for child in multiprocessing.active_children()}  # of earlier tests

    def kill_worker(self, trainer, module):
        after_step(self, trainer, module)
        if module.progress.step == 2:
            [worker] = {child.pid for child in multiprocessing.active_children()} - others
            os.kill(worker, signal.SIGKILL)

    monkeypatch.setattr(StepEnd, "after_step", kill_worker)
    config = make_config(data={"num_workers": 1}, training={"max_steps": 1000})
    assert train.main(["--config", str(config)]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: data.num_workers: a worker process was killed, possibly out of")
    assert last.endswith(
        "Free memory, or lower data.num_workers. "
        f"The checkpoints in {config.parent / 'checkpoints'} are intact."
    )


def test_a_mistake_in_the_data_is_the_same_line_with_and_without_workers(
    make_config, capsys, tmp_path: Path
):
    """A stream is read in a worker; line 30 has no text."""
    rows = ['{"text": "a row of text, long enough"}\n'] * 60
    (tmp_path / "rows.jsonl").write_text("".join([*rows[:30], '{"txt": 1}\n', *rows]))
    (tmp_path / "val.txt").write_text("some other text for validation\n" * 9)
    errors = []
    for n_workers in (0, 1):
        data = {
            "dataset": str(tmp_path / "rows.jsonl"),
            "val_dataset": str(tmp_path / "val.txt"),
            "streaming": True,
            "shuffle_window": 4,
            "num_workers": n_workers,
        }
        config = make_config(data=data, training={"checkpoint_dir": str(tmp_path / str(n_workers))})
        assert train.main(["--config", str(config), "training.max_steps=100"]) == 2
        errors.append(capsys.readouterr().err.splitlines()[-1])
    assert errors[0].startswith(f"error: {tmp_path}/rows.jsonl:31: text: ")
    assert errors[0] == errors[1]


@pytest.mark.slow
def test_a_worker_that_hangs_is_killed_and_named(make_config, capsys, monkeypatch):
    """At micro-batch 4; it ignores SIGTERM, so the program would wait for it at its exit."""
    others = set(multiprocessing.active_children())
    get = RowDataset.__getitem__

    def hang(self, k):
        if get_worker_info() and k == 3:  # not in validation, which this process reads
            time.sleep(60)
        return get(self, k)

    monkeypatch.setattr(RowDataset, "__getitem__", hang)
    monkeypatch.setattr(tinylm.tokens.workers, "TIMEOUT_SECONDS", 3)
    assert train.main(["--config", str(make_config(data={"num_workers": 1}))]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last == (
        "error: data.num_workers: a worker process took more than 3 seconds to make micro-batch 4 "
        "since the start of this program. Look at the disk and the network that the data are on, "
        "and run the command again."
    )
    for worker in set(multiprocessing.active_children()) - others:
        worker.join(5)
    assert set(multiprocessing.active_children()) <= others


def test_a_bug_in_a_worker_is_a_traceback_that_names_the_micro_batch(make_config, monkeypatch):
    def fail(self, k):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(RowDataset, "__getitem__", fail)
    with pytest.raises(
        ZeroDivisionError, match="(?s)worker process 0.*a bug\nmicro-batch 1 of the"
    ):
        train.main(["--config", str(make_config(data={"num_workers": 1}))])
