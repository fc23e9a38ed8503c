"""Continue a prompt with a trained model, or ask a fine-tuned one; the text is streamed.

    python infer.py --prompt "Attention is"
    echo "Attention is" | python infer.py --temperature 0 --json
    python infer.py --ckpt checkpoints/sft/final.ckpt --prompt "Name three primary colours."
    python infer.py --chat
    python infer.py --prompt "12 + 7 =" --best-of 8 --verifier checkpoints/verifier/final.ckpt

A fine-tuned checkpoint records its prompt template, and the prompt is formatted with it; --no-wrap
continues it as plain text. A base model always continues. Results go to stdout, everything else to
stderr.
"""

import argparse
import sys
from pathlib import Path

from tinylm.cli.model_flags import (
    add_deterministic_flag,
    add_device_flag,
    add_source_flags,
    add_tokenizer_flag,
    add_weights_flags,
)
from tinylm.cli.program import Parser, run_program
from tinylm.cli.sampling_flags import add_sampling_flags, parse_number


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="python infer.py",
        usage='python infer.py --prompt "Attention is" [flags]',
        description="Continue a prompt with a trained model, or ask a fine-tuned one.",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="text to continue, or question; - or no flag: standard input, "
        "without its last newline",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="chat with a fine-tuned model: one question per line, the conversation is context",
    )
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="system message for a fine-tuned model (default: the most common one of its rows)",
    )
    parser.add_argument(
        "--no-wrap", action="store_true", help="do not format the prompt with the model's template"
    )
    add_source_flags(parser)
    add_tokenizer_flag(parser)
    add_device_flag(parser)
    add_deterministic_flag(parser)
    add_weights_flags(parser)
    parser.add_argument(
        "--show-probs",
        action="store_true",
        help="color each token by its probability; without color: token(probability)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the finished completions as JSON"
    )
    parser.add_argument(
        "--best-of",
        type=parse_number,
        metavar="N",
        help="draw N answers and print the one that --verifier scores highest",
    )
    parser.add_argument(
        "--verifier",
        type=Path,
        metavar="FILE",
        help="checkpoint of a verifier (finetune.py --config configs/verifier.yaml)",
    )
    add_sampling_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    arguments = make_parser().parse_args(argv)
    return run_program(lambda: run(arguments), debug=arguments.debug)


def run(arguments: argparse.Namespace) -> int:
    """Import what generation needs, after --help, and generate."""
    from tinylm.cli.infer import infer

    return infer(arguments)


if __name__ == "__main__":
    sys.exit(main())
