"""Curves of runs, attention maps compared with the formula, and the plot command."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tinylm.__main__ import main
from tinylm.checkpoint import format as checkpoint_format
from tinylm.common.errors import UserError
from tinylm.config.schema import Config, ModelConfig
from tinylm.model.decoder import Decoder
from tinylm.runs.metrics_csv import COLUMNS
from tinylm.runs.plots import (
    QUANTITIES,
    Run,
    attention_maps,
    draw,
    draw_attention,
    find_runs,
    read_metrics,
    smoothed,
    text_plot,
)
from tinylm.tokenizer.byte_char import ByteTokenizer

TINY = {"vocab_size": 260, "n_layers": 2, "d_model": 16, "n_heads": 4, "max_seq_len": 12}


def write_metrics(folder: Path, rows: list[str]) -> Path:
    """A metrics.csv in `folder` with the columns that training writes."""
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("\n".join([",".join(COLUMNS), *rows]), encoding="utf-8")
    return folder / "metrics.csv"


def row(step: int, train: str, val: str = "") -> str:
    """One row of metrics: step, train_loss, val_loss and val_ppl."""
    cells = {
        "step": str(step),
        "train_loss": train,
        "val_loss": val,
        "val_ppl": val and repr(math.exp(float(val))),
        "lr": "0.001",
    }
    return ",".join(cells.get(name, "") for name in COLUMNS)


def write_checkpoint(path: Path, validations: list[list[float]], **model) -> None:
    """A checkpoint of a tiny decoder with these validations."""
    config = Config.model_validate(
        {"model": TINY | model, "training": {"seq_len": 8, "run_name": "from-ckpt"}}
    )
    torch.manual_seed(0)
    weights = Decoder(config.model).state_dict()
    state = {
        "format": checkpoint_format.FORMAT,
        "schema": checkpoint_format.SCHEMA,
        "stage": "pretrain",
        "step": 3,
        "tokens": 9,
        "train_loss": None,
        "val_loss": None,
    }
    state |= {
        "created": 0.0,
        "config": config.to_plain(),
        "tokenizer": ByteTokenizer().to_plain(),
        "weights": weights,
    }
    checkpoint_format.write(path, state | {"progress": {"validations": validations}})


def test_a_curve_skips_missing_values_and_an_incomplete_last_line(tmp_path):
    run = read_metrics(
        write_metrics(tmp_path / "smoke", [row(10, "3.5"), row(20, "3.0", "3.25"), "30,2."])
    )
    assert run.name == "smoke"
    assert [part.tolist() for part in run.curve("train_loss")] == [[10, 20], [3.5, 3.0]]
    assert [part.tolist() for part in run.curve("val_loss")] == [[20], [3.25]]
    assert [part.tolist() for part in run.curve("no_such_column")] == [[], []]


def test_a_run_without_metrics_is_read_from_its_checkpoints(tmp_path):
    """The perplexity is exp of the loss. A run that has both is read from its metrics."""
    write_metrics(tmp_path / "logs" / "a", [row(1, "2.0")])
    write_checkpoint(tmp_path / "checkpoints" / "step-000003.ckpt", [[1, 2.0], [3, 1.0]])
    by_name = {run.name: run for run in find_runs([tmp_path / "checkpoints", tmp_path / "logs"])}
    assert by_name.keys() == {"a", "from-ckpt"}
    assert by_name["from-ckpt"].curve("val_ppl")[1].tolist() == pytest.approx(
        [math.exp(2), math.exp(1)]
    )
    write_metrics(tmp_path / "logs" / "from-ckpt", [row(1, "2.0")])
    assert [run.name for run in find_runs([tmp_path / "checkpoints", tmp_path / "logs"])] == [
        "a",
        "from-ckpt",
    ]


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere", "not found"), ("", "no metrics.csv and no checkpoints")]
)
def test_nothing_to_draw_is_an_error(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        find_runs([tmp_path / name])


def test_smoothed_values_are_means_of_the_last_window():
    values = np.random.default_rng(0).normal(size=50)
    for window in (1, 3, 50, 80):
        expected = [values[max(0, i - window + 1) : i + 1].mean() for i in range(50)]
        np.testing.assert_allclose(smoothed(values, window), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.slow
def test_a_figure_has_a_labeled_line_per_run_and_names_the_smoothing():
    runs = [
        Run(name, np.arange(1.0, 41), {"train_loss": np.linspace(4, start, 40)})
        for name, start in (("one", 2), ("two", 3))
    ]
    axes = draw("train_loss", runs, smooth=5).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "nats per token")
    assert axes.get_title() == "Training loss (mean of 5 rows; raw values in a lighter color)"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two"]
    assert axes.lines[0].get_ydata().tolist() == runs[0].columns["train_loss"].tolist()
    assert axes.lines[1].get_ydata().tolist() == smoothed(runs[0].columns["train_loss"], 5).tolist()


def stage_run(folder: Path, name: str, column: str) -> Run:
    """The run of a metrics.csv with the additional column of a stage."""
    path = write_metrics(folder / name, [row(1, "2.0", "1.5"), row(2, "1.0", "0.5")])
    header, *rows = path.read_text(encoding="utf-8").splitlines()
    text = "\n".join([f"{header},{column}", *(f"{line},0.5" for line in rows)])
    path.write_text(text + "\n", encoding="utf-8")
    return read_metrics(path)


def test_losses_of_different_units_share_no_axis(tmp_path):
    """Tokens, pairs of answers and answers: three axes below each other, in pictures and text."""
    columns = {"sft": "val_accuracy", "dpo": "val_margin", "verifier": "val_auc"}
    runs = [stage_run(tmp_path, name, column) for name, column in columns.items()]
    figure = draw("val_loss", [*runs, runs[0]])
    units = [axes.get_ylabel() for axes in figure.axes]
    assert units == ["nats per token", "nats per pair", "nats per answer"]
    names = [[line.get_label() for line in axes.lines] for axes in figure.axes]
    assert names == [["sft", "sft"], ["dpo"], ["verifier"]]
    assert len(draw("lr", runs).axes) == 1
    titles = [line for line in text_plot("val_loss", runs).splitlines() if line[:3] == "Val"]
    assert titles == [f"Validation loss ({unit})" for unit in units]


def test_equal_lines_are_both_seen_and_steps_are_whole_numbers():
    """Another color, other dashes and other marks, hollow ones; three steps have no tick at 1.5."""
    runs = [Run(name, np.arange(1.0, 4), {"val_loss": np.ones(3)}) for name in "ab"]
    figure = draw("val_loss", runs)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    for property in ("color", "linestyle", "linewidth", "marker", "markerfacecolor"):
        first, second = (getattr(line, f"get_{property}")() for line in axes.lines)
        assert first != second
    assert all(float(tick).is_integer() for tick in axes.xaxis.get_ticklocs())


def test_a_text_plot_of_a_falling_line_runs_from_top_left_to_bottom_right():
    """The marks are in the corners and the center; the axis ends at the last step."""
    lines = text_plot(
        "train_loss",
        [Run("a", np.array([0.0, 50, 100]), {"train_loss": np.array([3.0, 2, 1])})],
        width=21,
        height=5,
    ).splitlines()
    assert lines[0] == "Training loss (nats per token)"
    assert (lines[1], lines[3], lines[5]) == (
        "3 |*",
        "  |" + " " * 10 + "*",
        "1 |" + " " * 20 + "*",
    )
    assert lines[7].endswith("step 100") and lines[8] == "* a"
    assert text_plot("val_loss", [Run("a", np.array([1.0]), {"train_loss": np.array([3.0])})]) == ""


OPTIONS = [
    {},
    {"n_kv_heads": 2},
    {"n_sinks": 2},
    {"position": "alibi"},
    {"sliding_window": 3},
    {"qk_norm": True},
    {"position": "learned"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_maps_are_the_weights_of_the_model(options):
    """Weights @ values, projected, are the output of each layer; future tokens have weight 0."""
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**(TINY | options))).eval()
    inputs, outputs = [], []

    def note(layer, arguments, output):
        inputs.append((layer, *arguments))
        outputs.append(output)

    for block in model.blocks:
        block.attention.register_forward_hook(note)
    ids = list(range(7))
    maps = attention_maps(model, ids)
    sinks = model.config.n_sinks
    assert maps.shape == (2, 4, 7, sinks + 7)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 4, 7))
    assert not maps[..., sinks:].triu(1).any()
    for weights, (layer, x, context), output in zip(maps, inputs, outputs, strict=True):
        values = layer.project(x, context)[2].repeat_interleave(4 // model.config.n_kv_heads, dim=1)
        torch.testing.assert_close(
            layer.out((weights @ values).transpose(1, 2).reshape(1, 7, -1)),
            output,
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize(
    ("values", "marks"), [([153.0, 64.0], ["70", "100", "150"]), ([9.0, 2.5], ["3", "5", "7"])]
)
def test_perplexities_within_a_power_of_ten_have_tick_labels(values, marks):
    """Powers of ten alone would give one label or none."""
    figure = draw("val_ppl", [Run("a", np.arange(2.0), {"val_ppl": np.array(values)})])
    figure.draw_without_rendering()
    axis = figure.axes[0].yaxis
    assert [
        tick.label1.get_text()
        for tick in axis.get_major_ticks()
        if min(values) <= tick.get_loc() <= max(values)
    ] == marks
    assert axis.get_minorticklocs().size == 0


def test_too_many_heads_for_a_page_are_an_error():
    with pytest.raises(
        UserError, match=r"attention maps: must be at most 144, got 156 \(13 layers of 12 heads\)"
    ):
        draw_attention(torch.zeros(13, 12, 2, 2), ["a", "b"])


@pytest.mark.slow
def test_the_command_writes_a_plot_per_metric_with_values(tmp_path, capsys):
    """`row` leaves val_bpb empty."""
    write_metrics(tmp_path / "logs" / "a", [row(step, "2.0", "1.5") for step in (1, 2, 3)])
    assert (
        main(["plot", str(tmp_path / "logs"), "--out", str(tmp_path / "out"), "--smooth", "2"]) == 0
    )
    printed = capsys.readouterr().out.split()
    assert printed == [
        str(tmp_path / "out" / f"{quantity}.png")
        for quantity in QUANTITIES
        if quantity in ("train_loss", "val_loss", "val_ppl", "lr")
    ]
    assert all(Image.open(path).size == (960, 540) for path in printed)


def test_the_command_draws_in_the_terminal(tmp_path, capsys):
    write_metrics(tmp_path / "logs" / "a", [row(step, "2.0") for step in (1, 2)])
    assert main(["plot", str(tmp_path / "logs"), "--text"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Training loss (nats per token)\n") and "Validation" not in out


@pytest.mark.slow
def test_the_command_draws_attention(tmp_path, capsys):
    write_checkpoint(tmp_path / "step-000003.ckpt", [])
    arguments = [
        "plot",
        "--attention",
        "--ckpt",
        str(tmp_path / "step-000003.ckpt"),
        "--out",
        str(tmp_path),
    ]
    assert main([*arguments, "--prompt", "The cat"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'attention.png'}\n"
    assert Image.open(tmp_path / "attention.png").width > 500
    for prompt, message in (
        ("", "must have 1 to 12 tokens for this model, got 0"),
        ("x" * 13, "must have 1 to 12 tokens for this model, got 13"),
    ):
        assert main([*arguments, "--prompt", prompt]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plot"], "plot: no folder given"),
        (["plot", ".", "--smooth", "0"], "--smooth: must be at least 1, got 0"),
        (["plot", "--attention", "--prompt", "x"], "Give --ckpt FILE and --prompt TEXT"),
    ],
)
def test_invalid_arguments_are_an_error(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
