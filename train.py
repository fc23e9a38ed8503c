"""Pretraining: a config in, checkpoints out.

    python train.py --config config_smoke.yaml
    python train.py --config config.yaml training.max_steps=1000 hardware.precision=bf16

Run the same command again after a crash, and training continues exactly where it stopped. The run
itself is `training/run.py`; fine-tuning is `finetune.py`.
"""

import argparse
import sys
from dataclasses import replace

from tinylm.cli.program import run_program, training_parser

# A small model learns one batch by heart in one or two hundred steps.
OVERFIT_STEPS = 300


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line of train.py."""
    description = "Pretrain a model. The same command again resumes from the newest checkpoint."
    parser, before = training_parser("train.py", "config.yaml", description)
    before.add_argument(
        "--plan",
        action="store_true",
        help="what the run will cost: FLOPs, memory by part, time; exit code 2 if it does not fit",
    )
    before.add_argument(
        "--overfit-one-batch",
        nargs="?",
        type=number_of_steps,
        const=OVERFIT_STEPS,
        metavar="STEPS",
        help=f"train on micro-batch 0 alone for at most STEPS steps (default: {OVERFIT_STEPS}); "
        "exit code 3 if its loss does not fall to nearly zero",
    )
    before.add_argument(
        "--find-lr",
        action="store_true",
        help="raise the learning rate until the loss rises too, and suggest one",
    )
    before.add_argument(
        "--find-batch-size",
        action="store_true",
        help="the largest micro-batch that fits, and the speed of each size",
    )
    return parser.parse_intermixed_args(argv)


def number_of_steps(text: str) -> int:
    """The value of --overfit-one-batch, which is optional;
    a setting after the flag is not taken for one.
    """
    if not text.isdecimal() or int(text) == 0:
        problem = f"must be a number of steps, got {text}"
        raise argparse.ArgumentTypeError(f"{problem}. Put settings before the flag")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    args = parse(argv)
    return run_program(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    """Pretrain, or do what the flags before a run ask for."""
    from tinylm.config.loader import load_config, require_here
    from training.stages.pretrain import PRETRAIN

    config = load_config(args.config, args.overrides)
    require_here(config, args.config)
    if args.print_config:
        from training.print_config import print_config

        return print_config(config)
    if args.show_rows is not None:
        from training.show_rows import show_rows_of_run

        return show_rows_of_run(PRETRAIN, config, args.show_rows)
    if args.plan or args.find_lr or args.find_batch_size or args.overfit_one_batch is not None:
        from training.preflight import run_preflight

        return run_preflight(PRETRAIN, config, args)
    from training.context import ResumeOptions
    from training.run import train

    sample = None
    if config.training.sample_prompt is not None:
        from training.sampling import sample_text as sample

    stage = replace(PRETRAIN, next_command=None) if args.no_next else PRETRAIN
    return train(
        stage, config, ResumeOptions(args.resume, args.no_resume, args.allow_changes), sample
    )


if __name__ == "__main__":
    sys.exit(main())
