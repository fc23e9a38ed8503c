"""The folder of a run, its report, and the table and the comparison of runs."""

import json
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest

from tinylm.__main__ import main
from tinylm.config.schema import Config
from tinylm.runs.metrics_csv import read_columns
from tinylm.runs.record import RunRecord, command_line
from tinylm.runs.report import report_of
from tinylm.runs.run_folder import (
    COMPLETE,
    RUNNING,
    RunFacts,
    RunFolder,
    read_facts,
    read_run_folder,
)
from tinylm.runs.svg import MAX_POINTS, line_chart, thinned, ticks
from train import main as train

EVIL = "<script>alert(1)</script>\x1b[31m"


def run_with(**facts: object) -> RunFolder:
    columns = {"step": [1.0, 2.0], "train_loss": [3.0, 2.5], "val_loss": [float("nan"), 2.75]}
    samples = [{"step": 1, "text": "first"}, {"step": 2, "text": EVIL}]
    return RunFolder(Path("logs/x"), RunFacts(**facts), columns, samples, f"a: {EVIL}\n")


def test_nothing_of_a_run_becomes_markup() -> None:
    page = report_of(
        run_with(
            run_name=EVIL,
            stage=EVIL,
            message=EVIL,
            model=EVIL,
            device=EVIL,
            lines=[EVIL],
            command=["train.py", EVIL],
            versions={EVIL: EVIL},
            checkpoint_dir=EVIL,
        )  # fmt: skip
    )
    assert "<script" not in page and "\x1b" not in page
    assert page.count("&lt;script&gt;") >= 9
    assert not re.search(r"https?://|src=|url\(|@import", page)


def test_a_page_reloads_only_while_its_run_trains() -> None:
    assert 'http-equiv="refresh"' in report_of(run_with(status=RUNNING))
    assert 'http-equiv="refresh"' not in report_of(run_with(status=COMPLETE))


def test_a_run_without_metrics_has_a_page(tmp_path: Path) -> None:
    page = report_of(read_run_folder(tmp_path))
    assert page.startswith("<!doctype html>") and "<svg" not in page


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]",
        "{",
        '{"step": "3"}',
        '{"step": 1.5}',
        '{"lines": 3}',
        '{"lines": [1]}',
        '{"versions": []}',
        '{"best_val_loss": "x"}',
        '{"best_val_loss": NaN}',
        '{"updated": 1e300}',
        '{"seconds": Infinity}',
        "null",
        "\x1f\x8b\x00",
    ],
)
def test_a_damaged_run_json_is_as_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content, encoding="utf-8")
    assert read_run_folder(tmp_path).facts.run_name == tmp_path.name


def test_a_sample_that_a_crash_cut_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "text": "a"}\n[2]\n{"step": 2, "te')
    assert read_run_folder(tmp_path).samples == [{"step": 1, "text": "a"}]


def test_thinning_keeps_every_peak() -> None:
    points = [(float(i), 0.0) for i in range(50_000)]
    points[12_345] = (12_345.0, 9.0)
    points[33_333] = (33_333.0, -9.0)
    kept = thinned(points)
    assert len(kept) <= MAX_POINTS + 2
    assert {points[0], points[12_345], points[33_333], points[-1]} <= set(kept)
    assert kept == sorted(kept)


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [0.0, 0.0], [1e-9, 3e-9], [-1e30, 1e30]])
def test_a_chart_of_any_values_is_inside_its_frame(values: list[float]) -> None:
    svg = line_chart([("x", list(range(len(values))), values)], label="x")
    numbers = re.findall(r'points="([^"]+)"', svg)[0].replace(",", " ").split()
    assert all(0 <= float(number) <= 640 for number in numbers)
    assert ticks(min(values) - 1, max(values) + 1)


def test_a_chart_without_values_is_none() -> None:
    assert line_chart([("x", [1.0], [float("nan")])], label="x") == ""


@pytest.mark.parametrize(
    "content",
    [
        "step,epoch,train_loss\n1,0,2.0\n",  # of Lightning's CSVLogger
        "step,val_loss,tokens\n1,inf,inf\n",
        "step,val_loss,tokens\n1,2.0,8,9,9\n",
    ],
)
def test_a_metrics_file_of_another_program_is_listed(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.csv").write_text(content, encoding="utf-8")
    run = read_run_folder(tmp_path)
    assert (run.facts.best_val_loss, run.facts.tokens) == (None, 0)
    assert report_of(run)
    assert main(["runs", str(tmp_path)]) == 0


def test_a_run_that_cannot_be_read_does_not_hide_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "good", 1.0)
    (tmp_path / "bad" / "metrics.csv").mkdir(parents=True)
    assert main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["run", "good"]
    assert "skipped: " in shown.err and "not a regular file" in shown.err


@pytest.mark.slow
def test_a_report_that_takes_long_waits_until_the_end_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seconds of work at a share of 0.02: the next one is due after 100 seconds. run.json is
    current all the time.
    """
    clock = {"thread_time": 0.0, "monotonic": 1000.0}
    for name in clock:
        monkeypatch.setattr(f"tinylm.runs.record.time.{name}", partial(clock.get, name))
    made = []

    def report(run: RunFolder) -> str:
        clock["thread_time"] += 2.0
        made.append(run.facts.step)
        return ""

    monkeypatch.setattr("tinylm.runs.record.report_of", report)
    record = RunRecord(tmp_path, RunFacts())
    record.start(Config(), 0, is_new=True)
    for step in range(1, 13):
        clock["monotonic"] += 30
        record.facts.step = step
        record.renew()
        assert read_facts(tmp_path).step == step
    assert made == [1, 5, 9]
    record.facts.step = 13
    record.end(COMPLETE)
    assert made == [1, 5, 9, 13]


def test_a_mistake_in_the_report_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(run: RunFolder) -> str:
        raise OverflowError("too large")

    monkeypatch.setattr("tinylm.runs.record.report_of", fails)
    record = RunRecord(tmp_path, RunFacts())
    record.start(Config(), 0, is_new=True)
    record.renew()
    assert "the report was not written: OverflowError: too large" in caplog.text


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("/app/train.py", ["python", "train.py", "--x"]),
        ("/app/tinylm/__main__.py", ["python", "-m", "tinylm", "--x"]),
        ("/venv/bin/tinylm", ["tinylm", "--x"]),
    ],
)
def test_the_command_is_as_the_user_typed_it(
    program: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [program, "--x"])
    assert command_line() == words


# --- of a run that trains ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `logs` of a run `tiny` of 6 steps, validated at 3 and 6, and what it needs."""
    folder = tmp_path_factory.mktemp("trained")
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"document {i} says {i * i}.\n" for i in range(200)))
    config = folder / "config.yaml"
    config.write_text(f"""
model: {{n_layers: 1, d_model: 16, n_heads: 2, max_seq_len: 32}}
tokenizer: {{kind: byte}}
data: {{dataset: "{corpus}", cache_dir: "{folder}/cache"}}
training: {{seq_len: 16, micro_batch_size: 4, max_steps: 6, val_every_steps: 3, log_every_steps: 1,
  lr: 0.01, checkpoint_dir: "{folder}/checkpoints", log_dir: "{folder}/logs", run_name: tiny,
  sample_prompt: "<b>"}}
sampling: {{max_new_tokens: 4}}
hardware: {{accelerator: cpu, threads: 1}}
""")
    assert train(["--config", str(config)]) == 0
    return folder


def test_a_run_leaves_its_report(trained: Path) -> None:
    run = read_run_folder(trained / "logs" / "tiny")
    facts = run.facts
    assert (facts.stage, facts.status, facts.step, facts.max_steps) == (
        "pretrain",
        "complete",
        6,
        6,
    )
    assert facts.best_val_loss == min(v for v in run.columns["val_loss"] if v == v)
    assert facts.flops_per_token and facts.peak_bytes and facts.seconds > 0
    assert facts.next_command.startswith(f"python infer.py --ckpt {trained}/checkpoints/final.ckpt")
    assert [sample["step"] for sample in run.samples] == [3, 6]
    assert all(sample["text"].startswith("⟦<b>⟧") for sample in run.samples)
    assert any(line.startswith("data: ") for line in facts.lines)
    page = (trained / "logs" / "tiny" / "report.html").read_text(encoding="utf-8")
    assert page == report_of(run)
    assert "⟦&lt;b&gt;⟧" in page and "<polyline" in page


@pytest.mark.slow
def test_its_config_runs_it_again(trained: Path, tmp_path: Path) -> None:
    config = trained / "logs" / "tiny" / "config.yaml"
    words = [f"training.checkpoint_dir={tmp_path}/c", f"training.log_dir={tmp_path}/l"]
    assert train(["--config", str(config), *words]) == 0
    first = read_columns(trained / "logs" / "tiny" / "metrics.csv")
    again = read_columns(tmp_path / "l" / "tiny" / "metrics.csv")
    for column in ("train_loss", "grad_norm", "val_bpb"):
        assert [f"{x}" for x in again[column]] == [f"{x}" for x in first[column]]


@pytest.mark.slow
def test_a_resumed_run_continues_its_samples(trained: Path, tmp_path: Path) -> None:
    words = [f"training.checkpoint_dir={tmp_path}/c", f"training.log_dir={tmp_path}/l"]
    config = ["--config", str(trained / "config.yaml")]
    assert train([*config, *words, "training.max_steps=3", "training.schedule=constant"]) == 0
    folder = tmp_path / "l" / "tiny"
    before = read_run_folder(folder)
    words += ["training.max_steps=6", "training.schedule=constant"]
    assert train([*config, *words, "--allow-changes"]) == 0
    after = read_run_folder(folder)
    assert after.samples[:1] == before.samples
    assert [sample["step"] for sample in after.samples] == [3, 6]
    assert after.facts.began == before.facts.began
    assert after.facts.seconds > before.facts.seconds


def test_a_run_that_diverges_says_so(trained: Path, tmp_path: Path) -> None:
    words = [f"training.checkpoint_dir={tmp_path}/c", f"training.log_dir={tmp_path}/l"]
    words += ["training.lr=1e38", "training.schedule=constant", "training.warmup_ratio=0"]
    assert train(["--config", str(trained / "config.yaml"), *words]) == 3
    facts = read_run_folder(tmp_path / "l" / "tiny").facts
    assert facts.status == "failed" and "step" in facts.message


@pytest.mark.slow
def test_a_report_that_cannot_be_written_does_not_end_a_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "l" / "tiny" / "report.html").mkdir(parents=True)
    (tmp_path / "l" / "tiny" / "report.html" / "x").touch()
    words = [f"training.checkpoint_dir={tmp_path}/c", f"training.log_dir={tmp_path}/l"]
    assert train(["--config", str(trained / "config.yaml"), *words]) == 0
    assert "warning: " in (said := capsys.readouterr().err) and "report.html" in said


# --- tinylm runs ---


def write_run(folder: Path, updated: float, **settings: object) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(
        "step,train_loss,val_loss,val_ppl,val_bpb,lr,grad_norm,tokens,tokens_per_s\n"
        "5,3.0,3.5,,,0.1,1.0,100,10\n10,2.0,2.5,,,0.1,1.0,200,10\n"
    )
    facts = RunFacts(run_name=folder.name, stage="pretrain", updated=updated, step=10)
    (folder / "run.json").write_text(json.dumps(asdict(facts)))
    training = "".join(f"  {name}: {value}\n" for name, value in settings.items())
    (folder / "config.yaml").write_text(f"training:\n  run_name: {folder.name}\n{training}")


def test_runs_lists_all_runs_newest_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "old", 100.0)
    write_run(tmp_path / "deep" / "new", 200.0)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "metrics.csv").write_bytes((tmp_path / "old" / "metrics.csv").read_bytes())
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "bare", "deep/new", "old"]
    assert "2.5000" in lines[1]  # from metrics.csv: it has no run.json
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert [row["run_name"] for row in json.loads(capsys.readouterr().out)] == [
        "bare",
        "new",
        "old",
    ]


def test_runs_of_an_empty_and_a_missing_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path} and the folders in it\n"
    assert main(["runs", str(tmp_path / "no")]) == 2
    assert main(["runs", str(tmp_path), "b"]) == 2


def test_compare_shows_the_settings_that_differ_and_one_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a", 1.0, lr="1e-3", seed=3)
    write_run(tmp_path / "b", 2.0, lr="2e-3", seed=3)
    out = tmp_path / "plots" / "two.svg"
    assert (
        main(["runs", "compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 0
    )
    printed = capsys.readouterr().out
    assert re.search(r"training\.lr +0\.001 +0\.002", printed)
    assert "seed" not in printed and "run_name" not in printed
    assert "<svg" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["a"], "needs two or more runs, got 1"),
        (["a", "no"], "no run is here"),
        (["a", "a", "--metric", "x"], "must be one of train_loss"),
        (["a", "a", "--out", "x.doc"], "--out: must end with .png or .svg, got x.doc"),
    ],
)
def test_compare_refuses(
    words: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(tmp_path / "a", 1.0)
    monkeypatch.chdir(tmp_path)
    assert main(["runs", "compare", *words]) == 2
    assert problem in capsys.readouterr().err
