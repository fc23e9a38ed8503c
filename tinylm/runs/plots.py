"""Pictures of a run: its curves, on paper or in the terminal, and where each head of a model looks.

    find_runs         folders ─▶ runs, each with its columns over the steps      from metrics.csv, or from checkpoints
    draw, text_plot   one column of several runs ─▶ a figure, or lines of text
    attention_maps    a model and a text ─▶ (layers, heads, T, S) attention weights;  draw_attention makes the figure

Knows nothing of training: it reads what a run has written.
"""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tinylm.checkpoint import format as checkpoint_format
from tinylm.common.errors import UserError, reading
from tinylm.model.decoder import Attention, Decoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# What is drawn: a column of metrics.csv, the picture's title, and the unit on its axis.
QUANTITIES = {
    "train_loss": ("Training loss", "nats per token, pair or answer"),
    "val_loss": ("Validation loss", "nats per token, pair or answer"),
    "val_ppl": ("Validation perplexity", "exp of the loss"),
    "val_bpb": ("Validation bits per byte", "bits per byte of text"),
    "val_accuracy": ("Validation accuracy", "share of target tokens, or of pairs"),
    "val_margin": (
        "Validation margin",
        "reward of the chosen answer less that of the rejected one",
    ),
    "lr": ("Learning rate", "after warm-up and decay"),
}
# Far apart on any screen and for most eyes (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "*o+x#@%"
INCHES = (8.0, 4.5)
DOTS_PER_INCH = 120
# More heads than this fit no page.
MAX_HEADS_DRAWN = 144


@dataclass(frozen=True)
class Run:
    """What one run has measured: by column, the steps and the values at them, NaN where a row has none."""

    name: str
    steps: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def curve(self, quantity: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a column, rows without a value left out."""
        values = self.columns.get(quantity, np.full(len(self.steps), math.nan))
        there = ~np.isnan(values)
        return self.steps[there], values[there]


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """Every run below the folders: one a metrics.csv, and one a folder of checkpoints that has none of its own.

    Raises:
        UserError: a folder is not there, or there is nothing to draw in any.
    """
    runs: list[Run] = []
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            fix = "Give folders with metrics.csv (logs) or with checkpoints"
            raise UserError(folder, "no such folder", fix)
        runs += [read_metrics(path) for path in sorted(folder.rglob("metrics.csv"))]
    drawn = {run.name for run in runs}
    for folder in folders:
        holders = sorted({path.parent for path in folder.rglob("step-*.ckpt")})
        runs += [run for holder in holders if (run := read_checkpoints(holder)).name not in drawn]
    if not runs:
        raise UserError(
            ", ".join(map(str, folders)),
            "no metrics.csv and no checkpoints",
            "Train first, or give the folder in training.log_dir",
        )
    return runs


def read_metrics(path: Path) -> Run:
    """The run that wrote `path`; a half-written last line is left out."""
    with reading(path), open(path, newline="", encoding="utf-8") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if None not in row.values() and (row.get("step") or "").isdigit()
        ]
    if not rows:
        return Run(path.parent.name, np.empty(0))
    columns = {name: np.array([_number(row[name]) for row in rows]) for name in rows[0]}
    return Run(path.parent.name, columns.pop("step"), columns)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def read_checkpoints(folder: Path) -> Run:
    """The run whose checkpoints are in `folder`: what the newest sound one says of every validation, and of its loss."""
    path = checkpoint_format.latest_valid(folder)
    assert path is not None  # the caller found one
    state = checkpoint_format.read(path)
    validations = np.array(state["progress"]["validations"], dtype=float).reshape(-1, 2)
    losses = validations[:, 1]
    name = state["config"]["training"]["run_name"]
    return Run(
        name, validations[:, 0], {"val_loss": losses, "val_ppl": np.exp(np.minimum(losses, 20.0))}
    )


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and the window - 1 before it; at the start, of those there are.

    >>> smoothed(np.array([4.0, 2.0, 3.0, 1.0]), 2).tolist()
    [4.0, 3.0, 2.5, 2.0]
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


# --- curves -----------------------------------------------------------------------------------------------------------


def draw(quantity: str, runs: Sequence[Run], *, smooth: int = 1) -> "Figure":
    """One quantity over the optimizer steps, a line a run; with `smooth` > 1 the raw values stay visible behind the mean."""
    figure, axes = _new_figure()
    title, unit = QUANTITIES[quantity]
    for number, run in enumerate(runs):
        steps, values = run.curve(quantity)
        colour = COLOURS[number % len(COLOURS)]
        if smooth > 1 and len(values) > smooth:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smoothed(values, smooth), color=colour, label=run.name)
        elif len(values):
            axes.plot(
                steps,
                values,
                color=colour,
                label=run.name,
                marker="o" if len(values) < 30 else None,
                markersize=3,
            )
    axes.set(
        title=title + (f" (mean of {smooth} rows; raw values behind)" if smooth > 1 else ""),
        xlabel="optimizer step",
        ylabel=unit,
    )
    if quantity == "val_ppl":
        axes.set_yscale("log")
        axes.yaxis.get_major_locator().set_params(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    axes.grid(True, alpha=0.3)
    axes.legend()
    return figure


def draw_lines(
    lines: dict[str, np.ndarray], *, title: str, xlabel: str, ylabel: str, mark: tuple[int, str]
) -> "Figure":
    """Values over their index, a line a name; `mark` is an index at which something changes, and what."""
    figure, axes = _new_figure()
    for number, (name, values) in enumerate(lines.items()):
        # The later the thinner: a line that lies on another one hides none.
        axes.plot(
            values,
            color=COLOURS[number % len(COLOURS)],
            label=name,
            linewidth=3.0 - 2.0 * number / len(lines),
        )
    axes.axvline(mark[0], color="grey", linewidth=0.8, label=mark[1])
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(True, alpha=0.3)
    axes.legend()
    return figure


def _new_figure(size: tuple[float, float] = INCHES) -> tuple["Figure", Any]:
    """A figure that needs no screen, and its one pair of axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        fix = "pip install matplotlib, or use --text"
        raise UserError("matplotlib", "not installed, but needed for pictures", fix) from None
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    return figure, figure.subplots()


def text_plot(quantity: str, runs: Sequence[Run], *, width: int = 72, height: int = 16) -> str:
    """One quantity over the optimizer steps as lines of text, a mark a run; empty where no run has the quantity."""
    curves = [
        (mark, run.name, *run.curve(quantity))
        for mark, run in zip(MARKS * (len(runs) // len(MARKS) + 1), runs, strict=False)
    ]
    curves = [curve for curve in curves if len(curve[2])]
    if not curves:
        return ""
    title, unit = QUANTITIES[quantity]
    last = max(max(steps.max() for _, _, steps, _ in curves), 1.0)
    return text_curves(
        f"{title} ({unit})", curves, "0", f"step {last:.0f}", width=width, height=height
    )


def text_curves(
    title: str,
    curves: Sequence[tuple[str, str, np.ndarray, np.ndarray]],
    left: str,
    right: str,
    *,
    width: int = 72,
    height: int = 16,
) -> str:
    """Curves (mark, name, xs, ys) as lines of text, over an axis from `left`, at 0, to `right`, at the largest x."""
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


# --- attention --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def attention_maps(model: Decoder, ids: Sequence[int]) -> Tensor:
    """Where each head looks: (layers, heads, T, n_sinks + T) weights, each row of which sums to 1; sinks come first."""
    seen: list[Tensor] = []

    def note(layer: Attention, arguments: tuple[Any, ...]) -> None:
        seen.append(layer.weights(*arguments)[0])

    hooks = [block.attention.register_forward_pre_hook(note) for block in model.blocks]
    try:
        model.eval().features(torch.tensor([list(ids)], device=model.embedding.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen).float().cpu()


def draw_attention(maps: Tensor, tokens: Sequence[str]) -> "Figure":
    """A grid of maps, layers downwards and heads across: the darker a cell, the more its row's token looks at its column's.

    Raises:
        UserError: there are more heads than a page can hold.
    """
    layers, heads, T, S = maps.shape
    if layers * heads > MAX_HEADS_DRAWN:
        problem = f"{layers} layers of {heads} heads are {layers * heads} maps, at most {MAX_HEADS_DRAWN} fit"
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
    figure.supxlabel("looked at", fontsize=8)
    figure.supylabel("looking token", fontsize=8)
    figure.colorbar(image, ax=grid, label="attention weight", fraction=0.02)
    return figure
