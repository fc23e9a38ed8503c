"""Score a checkpoint on all validation data of a config: loss, perplexity and bits per byte.

python eval_val.py --ckpt checkpoints/final.ckpt --config config_smoke.yaml
python eval_val.py --ckpt checkpoints/final.ckpt --config config_finetune.yaml --answers
"""

import argparse
import sys
from pathlib import Path

from tinylm.cli.model_flags import add_tokenizer_flag
from tinylm.cli.program import Parser, run_program


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python eval_val.py",
        usage="python eval_val.py --ckpt checkpoints/final.ckpt --config config_smoke.yaml",
        description="Score a checkpoint on all validation data of a config: "
        "val_loss, val_ppl, val_bpb.",
    )
    parser.add_argument("--ckpt", type=Path, required=True, metavar="FILE", help="the checkpoint")
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="YAML file with the data, training.seed and hardware to use; "
        "the checkpoint defines the model and precision",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that override the file"
    )
    parser.add_argument(
        "--answers",
        action="store_true",
        help="the data are questions and answers, as for finetune.py: score the answers",
    )
    add_tokenizer_flag(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    arguments = parse(argv)
    return run_program(lambda: run(arguments), debug=arguments.debug)


def run(arguments: argparse.Namespace) -> int:
    """Import what scoring needs, after --help, and score."""
    from tinylm.cli.eval_val import eval_val

    return eval_val(arguments)


if __name__ == "__main__":
    sys.exit(main())
