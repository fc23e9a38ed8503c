"""Fine-tuning: a model learns to answer, which of two answers is better, or from rewards;
or a verifier or a reward model learns to judge answers.

    python finetune.py --config config_finetune.yaml
    python finetune.py --config configs/lora-smollm2.yaml data.dataset=mine.jsonl
    python finetune.py --config configs/dpo.yaml
    python finetune.py --config configs/grpo.yaml
    python finetune.py --config configs/verifier.yaml
    python finetune.py --config configs/reward_model.yaml
    python finetune.py --config configs/sst2-gpt2-lora.yaml
    python finetune.py --config configs/instructions-from-scratch.yaml

It starts from the weights that training.init_from names, a checkpoint of ours or a Hugging Face
model (hf:NAME), with the flags, the steps and the exact resume of train.py. The config decides the
stage:

    verifier section   an encoder learns to tell right answers from wrong ones  stages/verifier.py
    grpo section       the model learns from the rewards of its own answers     stages/grpo.py
    dpo section        the model learns to prefer the first of two answers      stages/dpo.py
    reward_model section  a decoder learns to score the better answer higher    stages/reward_model.py
    distill section    beside the answers, it learns a teacher's distributions  stages/distill.py
    neither            the model learns the answers of rows of questions and    stages/sft.py
                       answers; with training.train_on=all also the questions   (in training/)
"""

import argparse
import sys
from dataclasses import replace

from tinylm.cli.program import run_program, training_parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line of finetune.py."""
    description = (
        "Teach a trained model to answer, or which answer is better. "
        "The same command again resumes from the newest checkpoint."
    )
    parser, before = training_parser("finetune.py", "config_finetune.yaml", description)
    before.add_argument(
        "--plan",
        action="store_true",
        help="what the run will cost, measured with a few steps: memory by part, time, and its "
        "first row; exit code 2 if it does not fit",
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    args = parse(argv)
    return run_program(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    """Run the stage that the config describes, or show its first rows."""
    from tinylm.config.loader import load_config, require_here
    from tinylm.eval.tasks.data import with_data_of_task
    from training.stages.sft import SFT

    config, stage = with_data_of_task(load_config(args.config, args.overrides)), SFT
    require_here(config, args.config)
    if config.verifier is not None:
        from training.stages.verifier import VERIFIER as stage
    elif config.reward_model is not None:
        from training.stages.reward_model import REWARD_MODEL as stage
    elif config.dpo is not None:
        from training.stages.dpo import DPO as stage
    elif config.grpo is not None:
        from training.stages.grpo import GRPO as stage
    elif config.distill is not None:
        from training.stages.distill import DISTILL as stage
    if args.print_config:
        from training.print_config import print_config

        return print_config(config)
    if args.show_rows is not None:
        from training.show_rows import show_rows_of_run

        return show_rows_of_run(stage, config, args.show_rows)
    if args.plan:
        from training.finetune_plan import plan_finetune

        return plan_finetune(stage, config)
    from training.context import ResumeOptions
    from training.run import train

    sample = None
    if config.training.sample_prompt is not None:
        from training.sampling import sample_text as sample

    if args.no_next:
        stage = replace(stage, next_command=None)
    return train(
        stage, config, ResumeOptions(args.resume, args.no_resume, args.allow_changes), sample
    )


if __name__ == "__main__":
    sys.exit(main())
