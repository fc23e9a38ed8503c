"""Continue a prompt with a trained model, or ask a fine-tuned one; the text is streamed.

    python infer.py --prompt "Attention is"
    echo "Attention is" | python infer.py --temperature 0 --json
    python infer.py --ckpt checkpoints/sft/final.ckpt --prompt "Name three primary colours."
    python infer.py --chat
    python infer.py --input prompts.jsonl --output answers.jsonl
    python infer.py --prompt "12 + 7 =" --best-of 8 --verifier checkpoints/verifier/final.ckpt

A fine-tuned checkpoint records its prompt template, and the prompt is formatted with it; --no-wrap
continues it as plain text. A base model always continues. Results go to stdout, everything else to
stderr.
"""

import argparse
import sys

from tinylm.cli.infer_flags import add_prompt_flags, add_result_flags
from tinylm.cli.model_flags import (
    add_deterministic_flag,
    add_device_flag,
    add_source_flags,
    add_tokenizer_flag,
    add_weights_flags,
)
from tinylm.cli.program import Parser, run_program
from tinylm.cli.sampling_flags import add_sampling_flags

HELP = {
    "prog": "python infer.py",
    "usage": 'python infer.py --prompt "Attention is" [flags]',
    "description": "Continue a prompt with a trained model, or ask a fine-tuned one.",
}


def make_parser(**texts: str) -> argparse.ArgumentParser:
    """The command line; `texts` of its help under another name, such as `tinylm chat`."""
    parser = Parser(**(HELP | texts))
    add_prompt_flags(parser)
    add_source_flags(parser)
    add_tokenizer_flag(parser)
    add_device_flag(parser)
    add_deterministic_flag(parser)
    add_weights_flags(parser)
    add_result_flags(parser)
    add_sampling_flags(parser)
    return parser


def main(argv: list[str] | None = None, **texts: str) -> int:
    """Run the program and return its exit code; for `texts` see `make_parser`."""
    arguments = make_parser(**texts).parse_args(argv)
    return run_program(lambda: run(arguments), debug=arguments.debug)


def run(arguments: argparse.Namespace) -> int:
    """Import what generation needs, after --help, and generate."""
    from tinylm.cli.infer import infer

    return infer(arguments)


if __name__ == "__main__":
    sys.exit(main())
