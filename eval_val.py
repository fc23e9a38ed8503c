"""Score checkpoints on all validation data of a config: loss, perplexity and bits per byte.

python eval_val.py --ckpt checkpoints/final.ckpt --config config_smoke.yaml
python eval_val.py --ckpt checkpoints/final.ckpt --config config_finetune.yaml --answers
python eval_val.py --ckpt "checkpoints/step-*.ckpt" --config config_smoke.yaml --out scores.csv
"""

import argparse
import re
import sys
from pathlib import Path

from tinylm.cli.model_flags import add_tokenizer_flag
from tinylm.cli.program import Parser, run_program

SETTING = re.compile(r"[a-z_]+\.[a-z_.]+=")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python eval_val.py",
        usage="python eval_val.py --ckpt checkpoints/final.ckpt --config config_smoke.yaml",
        description="Score checkpoints on all validation data of a config: "
        "val_loss, val_ppl, val_bpb.",
    )
    parser.add_argument(
        "--ckpt",
        nargs="+",
        required=True,
        metavar="PATTERN",
        help="checkpoints: files or globs; a verifier is scored on right and wrong answers, a reward model on pairs",
    )
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
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the scores to FILE: .csv or .json"
    )
    arguments = parser.parse_intermixed_args(argv)
    # A setting right after the checkpoints is not one of them: --ckpt a.ckpt data.dataset=b.txt
    settings = [word for word in arguments.ckpt if SETTING.match(word)]
    arguments.ckpt = [word for word in arguments.ckpt if word not in settings]
    arguments.overrides = settings + arguments.overrides
    return arguments


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
