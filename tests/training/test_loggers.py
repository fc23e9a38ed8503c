"""What TensorBoard, Weights & Biases and trackio have stored of a run that was continued twice:
settings, metrics, samples, and one run. The stores are read back.
"""

import importlib.util
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from tests import programs
from tinylm.checkpoint import format as checkpoint_format

ROOT = Path(__file__).resolve().parents[2]
Make = Callable[..., Path]


def settings(name: str) -> dict:
    return {
        "loggers": [name],
        "sample_prompt": "the",
        "val_every_steps": 1,
        "log_every_steps": 1,
        "lr": 0.00123,
    }


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def run_three_times(config: Path, folder: Path, **environment: str) -> None:
    """In processes of their own, to step 1, 2 and 3."""
    for n_steps in (1, 2, 3):
        changed = [f"training.max_steps={n_steps}", "--allow-changes"]
        command = [sys.executable, ROOT / "train.py", "--config", config, *changed]
        done = programs.run(
            command, cwd=folder, env=os.environ | environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith("final.ckpt"), done.stdout
        assert done.stdout.count("\n") == 1, "stdout has the result alone"


def run_id(folder: Path) -> str:
    return checkpoint_format.read(folder / "checkpoints" / "final.ckpt")["logged_as"]


@pytest.mark.slow
def test_tensorboard_has_settings_metrics_samples_and_one_run(
    make_config: Make, tmp_path: Path
) -> None:
    config = make_config(training=settings("tensorboard"))
    ids = []
    for n_steps in (1, 2):
        changed = [f"training.max_steps={n_steps}", "--allow-changes"]
        assert train.main(["--config", str(config), *changed]) == 0
        ids.append(run_id(tmp_path))
    assert ids[0] == ids[1]
    stored = EventAccumulator(str(tmp_path / "logs" / "tiny"))
    stored.Reload()
    assert [event.step for event in stored.Scalars("val_loss")] == [1, 2]
    assert [event.step for event in stored.Tensors("sample/text_summary")] == [1, 2]
    [plugin] = [
        data
        for tag, data in stored.summary_metadata.items()
        if tag == "_hparams_/session_start_info"
    ]
    content = plugin.plugin_data.content
    assert b"training.lr" in content
    assert b"model.n_layers" in content
    if importlib.util.find_spec("matplotlib"):
        assert stored.Tags()["images"] == ["val_loss curve"]


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB; checksum 4, length 2, type 1) after a
    header of 7 bytes in the first block.
    """
    position, parts = 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@needs("wandb")
@pytest.mark.slow
def test_wandb_has_settings_metrics_samples_and_one_run_offline(
    make_config: Make, tmp_path: Path
) -> None:
    from wandb.proto import wandb_internal_pb2

    config = make_config(training=settings("wandb"))
    run_three_times(config, tmp_path, WANDB_MODE="offline")
    files = sorted((tmp_path / "logs").glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 3
    ids, steps, samples, found = set(), [], [], {}
    for file in files:
        for data in leveldb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                found |= {item.key: item.value_json for item in record.run.config.update}
            if record.HasField("history"):
                row = {
                    item.key or ".".join(item.nested_key): item.value_json
                    for item in record.history.item
                }
                if "val_loss" in row:
                    steps.append(record.history.step.num)
                samples += [row["sample"]] if "sample" in row else []
    assert ids == {run_id(tmp_path)}
    assert steps == [1, 2, 3]
    assert len(samples) == 3
    assert '"lr":0.00123' in found["training"].replace(" ", "")


@needs("trackio")
@pytest.mark.slow
def test_trackio_has_settings_metrics_samples_and_one_run(
    make_config: Make, tmp_path: Path
) -> None:
    """Read by its own storage class, in a process in which TRACKIO_DIR is set before its import."""
    config, store = make_config(training=settings("trackio")), str(tmp_path / "store")
    run_three_times(config, tmp_path, TRACKIO_DIR=store)
    code = (
        "from trackio.sqlite_storage import SQLiteStorage as S\n"
        "[name] = S.get_runs('tinylm')\n"
        "logs = S.get_logs('tinylm', name)\n"
        "print(name, [row['step'] for row in logs if 'val_loss' in row],"
        " sum('sample' in row for row in logs), S.get_run_config('tinylm', name)['training.lr'])"
    )
    environment = os.environ | {"TRACKIO_DIR": store}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == f"tiny-{run_id(tmp_path)} [1, 2, 3] 3 0.00123"


@pytest.mark.slow
def test_a_run_without_loggers_has_no_name_in_them(make_config: Make, tmp_path: Path) -> None:
    assert train.main(["--config", str(make_config()), "training.max_steps=1"]) == 0
    state = checkpoint_format.read(tmp_path / "checkpoints" / "final.ckpt")
    assert "logged_as" not in state
