"""finetune.py --plan: memory, time and the first row of any stage and model, and nothing is saved."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import finetune
import train
from tinylm.planning.step_memory import MemoryMeter
from training import finetune_plan, trial_steps

ROOT = Path(__file__).parents[2]
Make = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def config(
    make_config: Make, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The config of a run of fine-tuning, whose base was trained for one step."""
    monkeypatch.setattr(trial_steps, "TIMED_SECONDS", 0.0)
    assert train.main(["--config", str(make_config()), "training.max_steps=1"]) == 0
    base = tmp_path / "checkpoints" / "final.ckpt"
    rows = [{"instruction": f"a {n}", "output": f"{n}!", "rejected": "?"} for n in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    capsys.readouterr()
    return make_config(
        "tune.yaml",
        data={"dataset": str(data), "template": "plain", "val_fraction": 0.3},
        training={"init_from": str(base), "checkpoint_dir": str(tmp_path / "tuned")},
    )


def plan(config: Path, *settings: str) -> int:
    return finetune.main(["--config", str(config), "--plan", *settings])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ((), None),
        (("lora.r=2", "training.grad_accum_steps=3"), 2 * 7 * 32),
        (("hardware.compile=true", "training.optimizer=muon"), None),
    ],
    ids=["whole", "lora", "muon"],
)
def test_a_plan_has_memory_time_and_the_first_row(
    settings: tuple[str, ...], trained: int | None, config: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Weights are 4 bytes each. An adapter of rank 2 trains fewer."""
    before = {path for path in tmp_path.rglob("*") if "cache" not in str(path)}
    assert plan(config, *settings) == 0
    out, err = capsys.readouterr()
    n_all, n_trained = (
        int(number.replace(",", ""))
        for number in re.search(r"^parameters +([\d,]+), ([\d,]+) of them trained", out).groups()
    )
    assert (n_trained == n_all) == (trained is None)
    weights = re.search(r"^  weights +([\d.]+) kB", out, re.MULTILINE)
    tables = float(weights[1]) * 1000 - 4 * n_all  # of angles, and of bytes per token
    assert 260 * 8 <= tables < 4000
    assert re.search(r"^memory +\S+ [MG]B at the peak, \S+ GB available", out, re.MULTILINE)
    assert re.search(r"^time +\d+s of steps, .*\(\S+ s a step measured\)", out, re.MULTILINE)
    assert re.search(r"^row 0, micro-batch 0: \S+rows.jsonl:\d+", out, re.MULTILINE)
    assert ("without hardware.compile" in err) == ("hardware.compile=true" in settings)
    after = {path for path in tmp_path.rglob("*") if "cache" not in str(path)}
    assert after == before


@pytest.mark.slow
def test_a_plan_of_preferences(config: Path, capsys: Capture) -> None:
    """The frozen copy of the reference doubles the weights."""
    parts = []
    for settings in (("dpo.reference=copy",), ("dpo.reference=cached",)):
        columns = "data.columns={prompt: instruction, chosen: output}"
        assert plan(config, columns, *settings) == 0
        out = capsys.readouterr().out
        parts.append(float(re.search(r"^  weights +([\d.]+) kB", out, re.MULTILINE)[1]))
        assert "chosen" in out
    assert parts[0] == pytest.approx(2 * parts[1], rel=0.05)


@pytest.mark.slow
def test_micro_batches_that_do_not_fit_are_not_tried(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The error names the largest part of the micro-batch that fits by the estimate of one row."""
    took = []
    take = finetune_plan.TrialSteps.take

    def count_rows(self, batches):
        took.append(max(len(batch["input_ids"]) for batch in batches))
        take(self, batches)

    monkeypatch.setattr(finetune_plan.TrialSteps, "take", count_rows)
    monkeypatch.setattr(finetune_plan, "lost_to_allocator", lambda memory, device: 0)
    monkeypatch.setattr(finetune_plan, "resident_bytes", lambda: 0)
    assert plan(config, "training.micro_batch_size=2") == 0
    capsys.readouterr()
    for usable, fix in (
        (370_000, "training.micro_batch_size=2 training.grad_accum_steps=4"),
        (150_000, "Shorten the rows (training.seq_len)"),
        (1_000, "weights and gradients need"),
    ):
        took.clear()
        monkeypatch.setattr(finetune_plan, "usable_bytes", lambda *_, usable=usable, **__: usable)
        assert plan(config, "training.micro_batch_size=8") == 2
        err = capsys.readouterr().err
        assert fix in err.splitlines()[-1]
        assert max(took, default=0) <= 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param((), id="whole"),
        pytest.param(("lora.r=4",), id="lora", marks=pytest.mark.long),
        pytest.param(("lora.r=4", "lora.dora=true"), id="dora", marks=pytest.mark.long),
        pytest.param(("training.optimizer=adamw_8bit",), id="adamw_8bit", marks=pytest.mark.long),
        pytest.param(("lora.r=4", "lora.base_weights=nf4"), id="nf4", marks=pytest.mark.long),
    ],
)
def test_a_plan_is_within_15_percent_of_the_memory_of_the_run(
    settings: tuple[str, ...], make_config: Make, tmp_path: Path
) -> None:
    """The kernel's highest resident memory of finetune.py in a process of its own. What the run needs
    besides the program counts: it is 200 MB and more.
    """
    if "8bit" in str(settings) or "nf4" in str(settings):
        pytest.importorskip("bitsandbytes")
    shape = {"n_layers": 4, "d_model": 192, "n_heads": 4, "max_seq_len": 256}
    base = make_config("base.yaml", model=shape, training={"seq_len": 256})
    assert train.main(["--config", str(base), "training.max_steps=1"]) == 0
    text = "the quick brown fox " * 11
    rows = [{"instruction": f"{n} {text}", "output": "it jumps"} for n in range(60)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    start = str(tmp_path / "checkpoints" / "final.ckpt")
    config = make_config(
        "tune.yaml",
        model=shape,
        data={"dataset": str(data), "template": "plain", "val_fraction": 0.2},
        training={"init_from": start, "checkpoint_dir": str(tmp_path / "tuned"), "seq_len": 256,
                  "micro_batch_size": 16, "max_steps": 2, "train_on": "all"},
    )  # fmt: skip
    command = [sys.executable, "finetune.py", "--config", str(config), *settings]
    shown = subprocess.run(
        [*command, "--plan"], cwd=ROOT, capture_output=True, text=True, check=True
    )

    def planned(part: str) -> float:
        number, unit = re.search(
            rf"^ *{part} +([\d.]+) ([kMG]B)", shown.stdout, re.MULTILINE
        ).groups()
        return float(number) * {"kB": 1e-3, "MB": 1, "GB": 1e3}[unit]

    child = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0
    used = usage.ru_maxrss * 1024 / 1e6
    assert planned("memory") - planned("program") > 200
    assert planned("memory") == pytest.approx(used, rel=0.15)


def test_real_tensors_are_counted_while_they_live() -> None:
    """Views and tensors from before are no new memory; 4 bytes a number."""
    weight = torch.ones(100)
    meter = MemoryMeter(has_contents=True)
    meter.adopt(weight, "weights")
    meter.adopt(weight[:10], "weights")
    with meter:
        meter.part = "activations"
        kept = weight.view(10, 10) * 2
        gone = kept + 1
        del gone
        found = (kept > 0).nonzero()
    assert len(found) == 100
    assert meter.alive["weights"] == 400
    assert meter.alive["activations"] == 400 + found.nbytes
    assert meter.peak >= 400 + 800 + found.nbytes - 400
