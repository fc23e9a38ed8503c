"""What a run tells about its speed: columns of metrics.csv, and the trace of training.profile_steps."""

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.test_train import assert_same_run, elsewhere, run
from tinylm.config.loader import load_config
from tinylm.runs.report import report_of
from tinylm.runs.run_folder import read_run_folder
from training import instruments

Make = Callable[..., Path]


@pytest.mark.slow
def test_each_row_has_utilization_waiting_and_memory(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model needs 52,608 FLOPs per token (test_preflight.py), and bare products do 1e9 per
    second here: mfu is tokens_per_s · 52,608 / 1e9.
    """
    monkeypatch.setattr(instruments, "measure_matmul_flops", lambda *a, **named: 1e9)
    assert run(make_config()) == 0
    folder = tmp_path / "logs" / "tiny"
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for row in rows:
        expected = float(row["tokens_per_s"]) * 52_608 / 1e9
        assert float(row["mfu"]) == pytest.approx(expected)
        assert 0 <= float(row["data_wait"]) <= 1
        assert int(row["peak_bytes"]) > 1e6
    assert float(rows[1]["data_wait"]) > 0, "a micro-batch is read before each step but the first"
    page = report_of(read_run_folder(folder))
    assert all(name in page for name in ("MFU (median)", "waiting for data (median)"))


@pytest.mark.slow
def test_profile_steps_write_a_trace_and_log_ten_operators(
    make_config: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps 2 and 3 of two micro-batches: four forward passes, and so four lookups in the
    embedding. The run is the same as without it.
    """
    config = make_config(training={"grad_accum_steps": 2, "profile_steps": [2, 3]})
    with caplog.at_level(logging.INFO):
        assert run(config) == 0
    trace = tmp_path / "logs" / "tiny" / "trace-2-3.json"
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    assert sum(event.get("name") == "aten::embedding" for event in events) == 4
    at = next(n for n, line in enumerate(caplog.messages) if line.startswith("profile of steps 2"))
    operators = caplog.messages[at + 1 : at + 11]
    assert all(" calls  " in line for line in operators)
    shares = [float(line.split("%")[0]) for line in operators]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.1
    assert run(config, "training.profile_steps=null", *elsewhere(tmp_path / "plain")) == 0
    assert_same_run(tmp_path / "plain", tmp_path)


def test_profile_steps_are_the_first_and_the_last(make_config: Make) -> None:
    with pytest.raises(Exception, match=r"must be the first and the last step, got \(4, 2\)"):
        load_config(make_config(training={"profile_steps": [4, 2]}))
