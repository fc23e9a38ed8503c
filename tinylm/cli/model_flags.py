"""The flags that choose a model, its tokenizer and the device, for every program that loads one."""

import argparse
from pathlib import Path

from tinylm.common.device import NAMES

BATCH_SIZE = 16
BATCH_HELP = f"texts scored or generated together ({BATCH_SIZE})"


def positive(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """--ckpt and --dir: checkpoints, or the latest one of a folder."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--ckpt",
        type=Path,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="checkpoint (default: final.ckpt in --dir, or the newest step of a run that has not "
        "ended; for --chat the newest fine-tuned one in --dir and its folders); with --input "
        "several files or globs, whose texts are written side by side",
    )
    source.add_argument(
        "--dir",
        type=Path,
        default=Path("checkpoints"),
        metavar="FOLDER",
        help="folder of checkpoints (checkpoints)",
    )


def add_tokenizer_flag(parser: argparse._ActionsContainer) -> None:
    """--tokenizer: the one in the checkpoint, or another."""
    parser.add_argument(
        "--tokenizer",
        default="auto",
        metavar="NAME",
        help="auto: the one in the checkpoint; else byte, or a Hugging Face name or folder",
    )


def add_deterministic_flag(parser: argparse._ActionsContainer) -> None:
    """--deterministic: what an engine is given as `deterministic`."""
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="generate a text the same to the last bit, whatever is generated with it (slower)",
    )


def add_weights_flags(parser: argparse._ActionsContainer) -> None:
    """--weights and --max-bpb-rise: what `round_weights` is given."""
    parser.add_argument(
        "--weights",
        choices=("fp32", "bf16", "int8", "int4"),
        help="precision of the weights; fewer bits take less memory and time on the CPU "
        "(as in the checkpoint)",
    )
    add_max_rise_flag(parser)


def add_max_rise_flag(parser: argparse._ActionsContainer) -> None:
    """--max-bpb-rise: what rounding may cost."""
    parser.add_argument(
        "--max-bpb-rise",
        type=float,
        default=0.02,
        metavar="N",
        help="refuse rounding that costs more bits per byte of the model's own text (0.02)",
    )


def add_device_flag(parser: argparse._ActionsContainer) -> None:
    """--device, auto by default."""
    parser.add_argument(
        "--device", choices=NAMES, default="auto", help="auto: CUDA, else MPS, else the CPU"
    )
