"""The report of the experiments: its tables are compared with the measurements it was given."""

import json
import logging
import math
from pathlib import Path

import pytest

from tinylm.common.errors import UserError
from tinylm.runs.compare import Comparison, evaluate, format_report
from tinylm.runs.experiments import plan_steps
from tinylm.runs.measure import CACHE_SETTINGS, RunMeasurements, Score

ROOT = Path(__file__).parents[2]


def score_of(run: str, seed: int, loss: float, step: int = 200) -> Score:
    return Score(run, seed, "pretrain", step, loss, math.exp(loss), loss * 1.5, 1000, 900, 64)


def runs_of(*losses: tuple[str, int, float], **more) -> dict[str, RunMeasurements]:
    return {
        f"{run}-{seed}": RunMeasurements(
            [score_of(run, seed, loss + 1, 100), score_of(run, seed, loss)], **more
        )
        for run, seed, loss in losses
    }


def test_the_report_compares_each_run_with_the_baseline_of_its_seed(tmp_path):
    """Means (2.0 + 2.2) / 2 and (2.1 + 2.15) / 2 of last checkpoints; differences +0.1, -0.05."""
    runs = runs_of(("base", 1, 2.0), ("base", 2, 2.2), ("gqa", 1, 2.1), ("gqa", 2, 2.15))
    report = format_report(Comparison(runs, {}, tmp_path), {}, [])
    assert "2 seeds: val_loss is the mean; the last column has one value per seed." in report
    assert "| base | 1,000 | 900 | 64 | 2.1000 | 3.1500 | +0.0000 +0.0000 |\n" in report
    assert "| gqa | 1,000 | 900 | 64 | 2.1250 | 3.1875 | +0.1000 -0.0500 |\n" in report
    assert report.count("## ") == 2  # one question has two runs; sample texts


def test_the_report_names_skipped_runs_and_warns_of_a_single_seed(tmp_path):
    report = format_report(
        Comparison(runs_of(("base", 1, 2.0)), {"no-norm": "error: the loss is nan"}, tmp_path),
        {},
        [],
    )
    assert "- no-norm: error: the loss is nan\n" in report
    assert "One seed: small differences may be noise." in report


def test_the_report_has_a_dash_beyond_the_positions_of_a_model(tmp_path):
    bands = {
        "base, as built": {"0-31": 1.5, "32-127": 1.25},
        "base, last 128": {"0-31": 1.5, "32-127": 1.25, "1024-2047": 3.0},
    }
    report = format_report(Comparison(runs_of(("base", 1, 2.0)), {}, tmp_path), bands, [])
    assert "| base, as built | 1.500 | 1.250 | - | - | - | - |\n" in report
    assert "| base, last 128 | 1.500 | 1.250 | - | - | - | 3.000 |\n" in report


def test_the_report_has_attention_shares_and_shares_of_known_words(tmp_path):
    """The mean of 0.8 and 0.4 is 60%; only the first text is printed."""
    runs = runs_of(
        ("base", 1, 2.0),
        attention={"sinks": 0.0, "sinks_max": 0.0, "first": 0.5, "first_max": 0.75},
    )
    text = {
        "run": "base",
        "seed": 1,
        "prompt": "Attention is",
        "max_new_tokens": 600,
        "words_known_first": 0.9,
    }
    texts = [
        text | {"sample": 1, "text": "one\ntwo", "words_known_last": 0.8},
        text | {"sample": 2, "text": "three", "words_known_last": 0.4},
    ]
    report = format_report(Comparison(runs, {}, tmp_path), {}, texts)
    assert "| base | 0.0% | 0.0% | 50.0% | 75.0% |\n" in report
    assert "| base | 90% | 60% |\n" in report
    assert "    one\\ntwo\n" in report
    assert "three" not in report


def test_the_report_has_the_scores_of_tasks(tmp_path):
    folder = tmp_path / "tasks/sst2"
    folder.mkdir(parents=True)
    row = {
        "task": "sst2",
        "checkpoint": "hf:gpt2",
        "shots": 4,
        "measure": "accuracy",
        "value": 0.6,
        "low": 0.5,
        "high": 0.7,
    }
    (folder / "results.json").write_text(json.dumps({"measures": [row]}), encoding="utf-8")
    report = format_report(Comparison(runs_of(("base", 1, 2.0)), {}, tmp_path), {}, [])
    assert "| sst2 | hf:gpt2 | 4 | accuracy | 0.6000 | 0.5000 to 0.7000 |\n" in report


def test_position_losses_are_means_over_seeds(tmp_path):
    runs = {
        f"base-{seed}": RunMeasurements(
            [score_of("base", seed, 2.0)],
            {setting.name: [float(seed)] for setting in CACHE_SETTINGS if setting.run == "base"},
        )
        for seed in (1, 3)
    }
    losses = Comparison(runs, {}, tmp_path).position_losses()
    assert {name: loss.tolist() for name, loss in losses.items()} == {
        setting.name: [2.0] for setting in CACHE_SETTINGS if setting.run == "base"
    }


def test_without_a_finished_run_the_report_is_an_error(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(ROOT)
    caplog.set_level(logging.INFO, "tinylm")
    steps = [step for step in plan_steps(tmp_path) if step.phase == "pretrain"]
    with pytest.raises(
        UserError, match=r"no finished run\. Run: python -m tinylm experiments --phase pretrain\."
    ):
        evaluate(steps, tmp_path)
    assert caplog.messages[0] == "base: skipped: not run"
