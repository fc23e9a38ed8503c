"""Supervised fine-tuning: a trained model learns to answer, whole or by small adapters.

    python finetune.py --config config_finetune.yaml
    python finetune.py --config configs/lora-smollm2.yaml data.dataset=mine.jsonl

It begins with the weights that training.init_from names, a checkpoint of ours or a Hugging Face model (hf:NAME), and is
otherwise train.py: the same flags, the same steps, the same exact resume. What it eats are rows of questions and answers
(`LitExamples` in data.py), of which the answers are learned.
"""

import argparse
import sys
from typing import TYPE_CHECKING

from tinylm.errors import UserError
from tinylm.program import run_program
from train import Say, make_parser, run_stage

if TYPE_CHECKING:
    from data import LitExamples
    from tinylm.config import Config
    from tinylm.tokenizer import Tokenizer


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    description = "Teach a trained model to answer. The same command again goes on from the newest checkpoint."
    return make_parser("finetune.py", "config_finetune.yaml", description).parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program; the exit code comes back."""
    args = parse(argv)
    return run_program(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    """Fine-tune as the command line says."""
    from tinylm.config import load_config

    config = load_config(args.config, args.overrides)
    if config.training.init_from is None:
        raise UserError("training.init_from: fine-tuning begins with a trained model. Set it to a checkpoint, or to hf:NAME for a Hugging Face model.")
    return run_stage("sft", config, args, open_examples)


def open_examples(config: "Config", tokenizer: "Tokenizer", say: Say) -> "LitExamples":
    """The questions and answers of a run."""
    from data import LitExamples

    data = LitExamples(config, tokenizer)
    data.prepare()
    say(data.describe())
    for note in data.notes:
        say(note)
    return data


if __name__ == "__main__":
    sys.exit(main())
