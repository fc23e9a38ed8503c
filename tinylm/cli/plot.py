"""`python -m tinylm plot`: curves of runs, or the attention maps of a checkpoint, as PNG files."""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from tinylm.common.errors import UserError, printable
from tinylm.common.files import writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

SUMMARY = "plot curves of runs, or attention maps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.usage = (
        "python -m tinylm plot checkpoints logs [--out FOLDER] [--smooth N] [--text]\n"
        "       python -m tinylm plot --attention --ckpt FILE --prompt TEXT [--out FOLDER]"
    )
    parser.description = "Plot curves of runs, or the attention maps of a model, as PNG files."
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="searched for metrics.csv and for checkpoints; several runs share one plot",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("plots"),
        metavar="FOLDER",
        help="folder for the PNG files (default: plots)",
    )
    parser.add_argument(
        "--smooth",
        type=int,
        default=1,
        metavar="N",
        help="moving average over N rows, with the raw values in the background (default: 1, off)",
    )
    parser.add_argument("--text", action="store_true", help="plot in the terminal, write no file")
    parser.add_argument(
        "--attention",
        action="store_true",
        help="attention maps of --ckpt on --prompt, layer by head",
    )
    parser.add_argument("--ckpt", type=Path, metavar="FILE", help="for --attention: the checkpoint")
    parser.add_argument("--prompt", metavar="TEXT", help="for --attention: the text to read")


def run(arguments: argparse.Namespace) -> int:
    """Plot what the flags ask for and print the paths of the files."""
    if arguments.attention:
        return plot_attention(arguments)
    from tinylm.runs.plots import QUANTITIES, draw, find_runs, text_plot

    if not arguments.folders:
        raise UserError(
            "plot",
            "no folder given",
            "Give the folders of runs: python -m tinylm plot checkpoints logs",
        )
    if arguments.smooth < 1:
        raise UserError(
            "--smooth",
            f"must be at least 1, got {arguments.smooth}",
            "Give the number of rows to average",
        )
    runs = find_runs(arguments.folders)
    logger.info("runs: %s", ", ".join(f"{run.name} ({len(run.steps)} rows)" for run in runs))
    for quantity in QUANTITIES:
        if not any(len(run.curve(quantity)[0]) for run in runs):
            continue
        if arguments.text:
            print(text_plot(quantity, runs), end="\n\n")
        else:
            figure = draw(quantity, runs, smooth=arguments.smooth)
            save_figure(figure, arguments.out / f"{quantity}.png")
    return 0


def plot_attention(arguments: argparse.Namespace) -> int:
    """Write the attention maps of a checkpoint on a text."""
    if arguments.ckpt is None or arguments.prompt is None:
        raise UserError(
            "plot --attention", "needs a model and a text", "Give --ckpt FILE and --prompt TEXT"
        )
    from tinylm.checkpoint.load import load_model
    from tinylm.runs.plots import attention_maps, draw_attention

    loaded = load_model(arguments.ckpt)
    ids = loaded.tokenizer.encode(arguments.prompt)
    limit = loaded.config.model.max_seq_len
    if not 1 <= len(ids) <= limit:
        raise UserError(
            "--prompt",
            f"must have 1 to {limit} tokens for this model, got {len(ids)}",
            "Give another text",
        )
    tokens = [loaded.tokenizer.token_text(id) for id in ids]
    figure = draw_attention(attention_maps(loaded.model, ids), tokens)
    save_figure(figure, arguments.out / "attention.png")
    return 0


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure and print its path."""
    with writing(path, "--out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    print(printable(path))
