"""Plots of runs: curves as images or as text in the terminal, and attention maps.

    find_runs         folders -> runs with their metrics, from metrics.csv or from checkpoints
    draw, text_plot   one metric of several runs -> a figure, or lines of text
    attention_maps    a model and a text -> attention weights; draw_attention makes a figure of them

Knows nothing of training: it reads the files of a run.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tinylm.checkpoint import format as checkpoint_format
from tinylm.common.errors import UserError, no_folder
from tinylm.model.decoder import Attention, Decoder
from tinylm.runs.metrics_csv import read_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Column of metrics.csv -> title of the plot, and unit of its y axis; {} is what the runs are scored
# on, and runs that differ in it get an axis each.
QUANTITIES = {
    "train_loss": ("Training loss", "nats per {}"),
    "val_loss": ("Validation loss", "nats per {}"),
    "val_ppl": ("Validation perplexity", "exp of the loss"),
    "val_bpb": ("Validation bits per byte", "bits per byte of text"),
    "val_accuracy": ("Validation accuracy", "share of {}s that are right"),
    "val_reward": ("Validation reward", "mean over sampled answers"),
    "val_pass_1": ("Validation pass@1", "share of sampled answers that pass"),
    "val_margin": (
        "Validation margin",
        "reward of the chosen minus the rejected answer",
    ),
    "lr": ("Learning rate", "after warm-up and decay"),
}
# The stage of a run -> what its losses and accuracies are means over.
SCORED_ON = {"dpo": "pair", "reward_model": "pair", "verifier": "answer", "grpo": "reward"}
SCORED_BY_DEFAULT = "token"
# Also distinct for color-blind readers (Okabe and Ito 2008); dashes and marks tell lines apart that
# lie on each other, or in a print without colors.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
SHAPES = "osD^vXP"
# About so many marks on a line.
N_SHAPES = 12
MARKS = "*o+x#@%"
INCHES = (8.0, 4.5)
DOTS_PER_INCH = 120
# More heads do not fit on a page.
MAX_HEADS_DRAWN = 144


@dataclass(frozen=True)
class Run:
    """The metrics of one run: steps, and one array per column with NaN for missing values."""

    name: str
    steps: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    scored_on: str = SCORED_BY_DEFAULT
    """what its losses and accuracies are means over"""

    def curve(self, quantity: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps and values of a column, without missing values."""
        values = self.columns.get(quantity, np.full(len(self.steps), math.nan))
        present = ~np.isnan(values)
        return self.steps[present], values[present]


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """All runs below the folders: one per metrics.csv, and one per other folder of checkpoints.

    Raises:
        UserError: a folder does not exist, or no folder has a run.
    """
    runs: list[Run] = []
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            fix = "Give folders with metrics.csv (logs) or with checkpoints"
            raise UserError(folder, no_folder(folder), fix)
        runs += [read_metrics(path) for path in sorted(folder.rglob("metrics.csv"))]
    names = {run.name for run in runs}
    for folder in folders:
        for checkpoint_dir in sorted({path.parent for path in folder.rglob("step-*.ckpt")}):
            run = read_checkpoints(checkpoint_dir)
            if run.name not in names:
                runs.append(run)
    if not runs:
        where = ", ".join(map(str, folders))
        fix = "Train first, or give the folder in training.log_dir"
        raise UserError(where, "no metrics.csv and no checkpoints", fix)
    return runs


def read_metrics(path: Path) -> Run:
    """The run of a metrics.csv."""
    columns = {name: np.array(values) for name, values in read_columns(path).items()}
    steps = columns.pop("step", np.empty(0))
    # metrics.csv does not name its stage; only pairs have a margin, only verifiers an AUC, only
    # sampled answers a pass@1.
    stage = "dpo" if "val_margin" in columns else "verifier" if "val_auc" in columns else ""
    stage = "grpo" if "val_pass_1" in columns else stage
    return Run(path.parent.name, steps, columns, SCORED_ON.get(stage, SCORED_BY_DEFAULT))


def read_checkpoints(folder: Path) -> Run:
    """The run of a checkpoint folder: all its validations, from its latest valid checkpoint."""
    path = checkpoint_format.latest_valid(folder)
    assert path is not None  # the caller found one
    state = checkpoint_format.read(path)
    if "progress" not in state:
        raise UserError(path, "an imported model, which was not validated", "Give another folder")
    validations = np.array(state["progress"]["validations"], dtype=float).reshape(-1, 2)
    losses = validations[:, 1]
    columns = {"val_loss": losses}
    scored_on = SCORED_ON.get(state["stage"], SCORED_BY_DEFAULT)
    if scored_on == SCORED_BY_DEFAULT:
        columns["val_ppl"] = np.exp(np.minimum(losses, 20.0))
    return Run(state["config"]["training"]["run_name"], validations[:, 0], columns, scored_on)


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The moving mean of each value and the window - 1 values before it; shorter at the start.

    >>> smoothed(np.array([4.0, 2.0, 3.0, 1.0]), 2).tolist()
    [4.0, 3.0, 2.5, 2.0]
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


# --- curves ---------------------------------------------------------------------------------------


def by_unit(quantity: str, runs: Sequence[Run]) -> dict[str, list[tuple[int, Run]]]:
    """The runs that have the metric, with their numbers, by its unit: values of different units
    share no axis.
    """
    units: dict[str, list[tuple[int, Run]]] = {}
    for number, run in enumerate(runs):
        if len(run.curve(quantity)[0]):
            unit = QUANTITIES[quantity][1].format(run.scored_on)
            if run.scored_on == "reward" and quantity.endswith("_loss"):
                unit = "minus the reward" if quantity == "val_loss" else "clipped objective"
            units.setdefault(unit, []).append((number, run))
    return units


def draw(quantity: str, runs: Sequence[Run], *, smooth: int = 1) -> "Figure":
    """One metric over optimizer steps, one line per run, one axis per unit;
    `smooth` > 1 adds a moving mean.
    """
    units = by_unit(quantity, runs)
    page_width, page_height = INCHES
    figure, panels = new_figure((page_width, page_height * len(units)), rows=len(units))
    title = QUANTITIES[quantity][0]
    if smooth > 1:
        title += f" (mean of {smooth} rows; raw values in a lighter color)"
    for axes, (unit, scored) in zip(panels, units.items(), strict=True):
        for place, (number, run) in enumerate(scored):
            # Later lines are thinner, so that equal lines stay visible.
            width = 3.0 - 2.0 * place / len(scored)
            _draw_run(axes, run.name, *run.curve(quantity), smooth, number, width)
        axes.set(title=title, xlabel="optimizer step", ylabel=unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if quantity == "val_ppl":
            axes.set_yscale("log")
            axes.yaxis.get_major_locator().set_params(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        axes.grid(True, alpha=0.3)
        axes.legend()
    return figure


def _draw_run(
    axes: Any,
    name: str,
    steps: np.ndarray,
    values: np.ndarray,
    smooth: int,
    number: int,
    width: float,
) -> None:
    """The line of one run, in the color, dashes and marks of its number."""
    color = COLORS[number % len(COLORS)]
    if smooth > 1 and len(values) > smooth:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        values = smoothed(values, smooth)
    axes.plot(
        steps,
        values,
        color=color,
        label=name,
        linewidth=width,
        linestyle=DASHES[number % len(DASHES)],
        marker=SHAPES[number % len(SHAPES)],
        markersize=4,
        # of two equal lines, the first is seen through the marks of the second
        markerfacecolor="none" if number % 2 else color,
        markevery=max(len(values) // N_SHAPES, 1),
    )


def draw_lines(
    lines: dict[str, np.ndarray], *, title: str, xlabel: str, ylabel: str, mark: tuple[int, str]
) -> "Figure":
    """Values over their index, one line per name; `mark` is a vertical line: (index, label)."""
    figure, (axes,) = new_figure()
    for number, (name, values) in enumerate(lines.items()):
        # Later lines are thinner, so that equal lines stay visible.
        axes.plot(
            values,
            color=COLORS[number % len(COLORS)],
            linestyle=DASHES[number % len(DASHES)],
            label=name,
            linewidth=3.0 - 2.0 * number / len(lines),
        )
    axes.axvline(mark[0], color="grey", linewidth=0.8, label=mark[1])
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(True, alpha=0.3)
    axes.legend()
    return figure


def new_figure(size: tuple[float, float] = INCHES, rows: int = 1) -> tuple["Figure", Any]:
    """A figure for files (no display needed) and its axes, one below the other."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        fix = "pip install matplotlib, or use --text"
        raise UserError("matplotlib", "not installed, but needed for pictures", fix) from None
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    return figure, figure.subplots(rows, squeeze=False)[:, 0]


def text_plot(quantity: str, runs: Sequence[Run], *, width: int = 72, height: int = 16) -> str:
    """One metric over optimizer steps as text, one mark per run, one plot per unit; empty if no run
    has the metric.
    """
    plots = []
    for unit, scored in by_unit(quantity, runs).items():
        curves = []
        for number, run in scored:
            curves.append((MARKS[number % len(MARKS)], run.name, *run.curve(quantity)))
        last = max(max(steps.max() for _, _, steps, _ in curves), 1.0)
        title = f"{QUANTITIES[quantity][0]} ({unit})"
        right = f"step {last:.0f}"
        plots.append(text_curves(title, curves, "0", right, width=width, height=height))
    return "\n\n".join(plots)


def text_curves(
    title: str,
    curves: Sequence[tuple[str, str, np.ndarray, np.ndarray]],
    left: str,
    right: str,
    *,
    width: int = 72,
    height: int = 16,
) -> str:
    """Curves (mark, name, xs, ys) as text; `left` and `right` label the ends of the x axis."""
    xs, ys = (np.concatenate([curve[part] for curve in curves]) for part in (2, 3))
    low, high, last = ys.min(), ys.max(), max(xs.max(), 1.0)
    cells = [[" "] * width for _ in range(height)]
    for mark, _, xs, ys in curves:
        columns = np.rint(xs / last * (width - 1)).astype(int)
        rows = np.rint((high - ys) / max(high - low, 1e-12) * (height - 1)).astype(int)
        for row, column in zip(rows, columns, strict=True):
            cells[row][column] = mark
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    margin = max(map(len, labels))
    body = [
        f"{label:>{margin}} |{''.join(line).rstrip()}"
        for label, line in zip(labels, cells, strict=True)
    ]
    axis = f"{'':>{margin}} +{'-' * width}"
    legend = "  ".join(f"{mark} {name}" for mark, name, _, _ in curves)
    return "\n".join(
        [title, *body, axis, f"{'':>{margin}}  {left}{right:>{width - len(left)}}", legend]
    )


# --- attention ------------------------------------------------------------------------------------


@torch.no_grad()
def attention_maps(model: Decoder, ids: Sequence[int]) -> Tensor:
    """Attention weights (layers, heads, T, n_sinks + T), learned sinks first; rows sum to 1."""
    maps: list[Tensor] = []

    def store_weights(layer: Attention, arguments: tuple[Any, ...]) -> None:
        maps.append(layer.weights(*arguments)[0])

    hooks = [block.attention.register_forward_pre_hook(store_weights) for block in model.blocks]
    try:
        model.eval().features(torch.tensor([list(ids)], device=model.embedding.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(maps).float().cpu()


def draw_attention(maps: Tensor, tokens: Sequence[str]) -> "Figure":
    """A grid of attention maps, one row per layer and one column per head.

    Raises:
        UserError: there are too many heads for a page.
    """
    layers, heads, T, S = maps.shape
    if layers * heads > MAX_HEADS_DRAWN:
        n_maps = layers * heads
        problem = (
            f"must be at most {MAX_HEADS_DRAWN}, got {n_maps} ({layers} layers of {heads} heads)"
        )
        raise UserError("attention maps", problem, "Choose a smaller model")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        fix = "pip install matplotlib"
        raise UserError("matplotlib", "not installed, but needed for pictures", fix) from None
    side = max(1.6, 0.16 * S)
    figure = Figure(
        figsize=(side * heads + 1.5, side * layers + 1.0), dpi=DOTS_PER_INCH, layout="constrained"
    )
    grid = figure.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
    columns = [f"sink {n + 1}" for n in range(S - T)] + list(tokens)
    for layer in range(layers):
        for head in range(heads):
            axes = grid[layer][head]
            image = axes.imshow(
                maps[layer, head].numpy(), cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto"
            )
            axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=7)
            axes.set_xticks(range(S), columns, rotation=90, fontsize=6)
            axes.set_yticks(range(T), list(tokens), fontsize=6)
    figure.supxlabel("attended token (key)", fontsize=8)
    figure.supylabel("attending token (query)", fontsize=8)
    figure.colorbar(image, ax=grid, label="attention weight", fraction=0.02)
    return figure
