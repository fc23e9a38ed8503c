"""eval_val.py: the same val_loss as validation during training, weighted by tokens."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import eval_val
import train
from tinylm.checkpoint import load as checkpoint_load
from tinylm.eval.perplexity import LOSS_CAP, language_score
from tinylm.tokens.token_file import TokenFile

Make = Callable[..., Path]


@pytest.fixture
def trained(make_config: Make, tmp_path: Path) -> Path:
    """The config of a finished run."""
    config = make_config()
    assert train.main(["--config", str(config)]) == 0
    return config


def scores(
    config: Path, folder: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> dict[str, float]:
    """What eval_val.py prints as JSON."""
    capsys.readouterr()
    assert (
        eval_val.main(
            [
                "--ckpt",
                str(folder / "checkpoints" / "final.ckpt"),
                "--config",
                str(config),
                "--json",
                *more,
            ]
        )
        == 0
    )
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_the_scores_equal_those_of_training(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last row of metrics.csv, to the last digit: same rows, same batches."""
    with open(tmp_path / "logs" / "tiny" / "metrics.csv", newline="", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    found = scores(trained, tmp_path, capsys)
    assert [found[name] for name in ("val_loss", "val_ppl", "val_bpb")] == [
        float(last[name]) for name in ("val_loss", "val_ppl", "val_bpb")
    ]


@pytest.mark.slow
def test_the_loss_is_a_mean_over_tokens_for_any_batch_size(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """575 validation tokens, the first of which is no target; the oracle scores row by row."""
    found = scores(trained, tmp_path, capsys, "training.micro_batch_size=1")
    loaded = checkpoint_load.load_model(tmp_path / "checkpoints" / "final.ckpt")
    (file,) = (tmp_path / "cache").glob("val-*.bin")
    tokens = torch.from_numpy(TokenFile.open(file).tokens.astype("int64"))
    losses = []
    for start in range(0, len(tokens) - 1, 16):
        window = tokens[start : start + 17]
        logits = loaded.model(window[None, :-1])[0]
        losses += torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").tolist()
    assert found["tokens"] == len(losses) == len(tokens) - 1
    assert found["val_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    n_bytes = int((tokens[1:] < 256).sum())
    assert found["val_bpb"] == pytest.approx(sum(losses) / math.log(2) / n_bytes, rel=1e-6)


@pytest.mark.slow
def test_the_text_output_is_one_line_with_the_token_count(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """val_loss, val_ppl and val_bpb, and the number of tokens."""
    capsys.readouterr()
    assert (
        eval_val.main(
            ["--ckpt", str(tmp_path / "checkpoints" / "best.ckpt"), "--config", str(trained)]
        )
        == 0
    )
    line = capsys.readouterr().out
    assert (
        line.startswith("val_loss ")
        and " val_ppl " in line
        and " val_bpb " in line
        and " tokens (" in line
    )


@pytest.mark.slow
def test_other_validation_data_than_in_training_is_noted(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another seed holds out other documents, some of which were trained on."""
    assert (
        eval_val.main(
            [
                "--ckpt",
                str(tmp_path / "checkpoints" / "final.ckpt"),
                "--config",
                str(trained),
                "training.seed=2",
            ]
        )
        == 0
    )
    assert "note: not the validation data of the training run" in capsys.readouterr().err


@pytest.mark.slow
def test_another_row_length_than_in_the_config_is_noted(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints trained on rows of different lengths are scored on different rows."""
    command = ["--ckpt", str(tmp_path / "checkpoints" / "final.ckpt"), "--config", str(trained)]
    assert eval_val.main(command) == 0
    assert "rows of" not in capsys.readouterr().err
    assert eval_val.main([*command, "training.seq_len=8"]) == 0
    expected = (
        f"note: rows of 16 tokens, as in the training of the checkpoint, not of 8, as in {trained}; "
        f"scores of different lengths are not comparable\n"
    )
    assert expected in capsys.readouterr().err


def test_perplexity_is_capped() -> None:
    """S0: exp of at most LOSS_CAP; the loss itself is not capped."""
    score = language_score(loss_sum=1000.0, tokens=1, n_bytes=1, n_right=0)
    assert (score.loss, score.perplexity) == (1000.0, math.exp(LOSS_CAP))


def test_a_nan_loss_stays_nan() -> None:
    """A NaN must not become 10.0, as in an older program (STYLE)."""
    score = language_score(loss_sum=math.nan, tokens=5, n_bytes=5, n_right=0)
    assert (
        math.isnan(score.loss) and math.isnan(score.perplexity) and math.isnan(score.bits_per_byte)
    )


def test_a_missing_checkpoint_is_one_line(
    make_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the file and the program that lists checkpoints."""
    assert eval_val.main(["--ckpt", str(tmp_path / "no.ckpt"), "--config", str(make_config())]) == 2
    assert (
        "no.ckpt: not found. Give a .ckpt file; `python list.py` lists them."
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_several_checkpoints_are_scored_as_each_alone_and_written_as_csv_and_json(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All steps by a glob, each file once under all its names; a damaged one is named, exit 2."""
    alone = scores(trained, tmp_path, capsys)
    (tmp_path / "checkpoints" / "step-999999.ckpt").write_bytes(b"damaged")
    pattern = str(tmp_path / "checkpoints" / "step-*.ckpt")
    for name in ("scores.csv", "scores.json"):
        out = tmp_path / "new" / name
        command = ["--ckpt", pattern, "--config", str(trained), "--out", str(out)]
        assert eval_val.main(command) == 2
        printed = capsys.readouterr()
        assert "step-999999.ckpt" in printed.err and "FAILED" in printed.err
    rows = json.loads(out.read_text(encoding="utf-8"))
    steps = sorted((tmp_path / "checkpoints").glob("step-*.ckpt"))
    assert [row["ckpt"] for row in rows] == [str(path) for path in steps[:-1]]
    assert {name: rows[-1][name] for name in alone if name != "ckpt"} == {
        name: value for name, value in alone.items() if name != "ckpt"
    }
    with open(out.with_suffix(".csv"), newline="", encoding="utf-8") as file:
        assert [float(row["val_loss"]) for row in csv.DictReader(file)] == [
            row["val_loss"] for row in rows
        ]


def test_a_setting_after_the_checkpoints_is_a_setting(tmp_path: Path) -> None:
    """--ckpt takes several names, and a setting is none of them."""
    words = ["--ckpt", "a.ckpt", "b.ckpt", "data.dataset=x.txt", "--config", "c.yaml"]
    found = eval_val.parse(words)
    assert (found.ckpt, found.overrides) == (["a.ckpt", "b.ckpt"], ["data.dataset=x.txt"])


def test_out_must_be_csv_or_json(
    tmp_path: Path, make_config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """Known before anything is scored."""
    command = ["--ckpt", "x.ckpt", "--config", str(make_config()), "--out", "scores.txt"]
    assert eval_val.main(command) == 2
    assert "error: --out: scores.txt: must end in .csv or .json" in capsys.readouterr().err
