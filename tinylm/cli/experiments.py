"""`python -m tinylm experiments`: train models that differ in one setting and compare them."""

import argparse
import logging
import shlex
from pathlib import Path

from tinylm.common.errors import UserError, printable

logger = logging.getLogger(__name__)

SUMMARY = "compare choices of architecture and training"
# The runs of each phase; smoke and eval, and all, end with the report.
RUNS_OF_PHASE = {
    "smoke": ("smoke",),
    "pretrain": ("pretrain",),
    "finetune": ("finetune",),
    "eval": (),
    "all": ("pretrain", "finetune"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.usage = "python -m tinylm experiments --phase smoke [--seeds N] [--out FOLDER]"
    parser.description = (
        "Train small models that differ in one setting, compare them, and write a report. "
        "A step that has a result is not run again."
    )
    parser.add_argument(
        "--phase",
        choices=tuple(RUNS_OF_PHASE),
        required=True,
        help="smoke: a few steps of each run, and a report; pretrain, finetune: the runs; "
        "eval: their tables, plots and sample texts; all: pretrain, finetune and eval",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="train each of the compared models N times (default: 1)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("experiments"),
        metavar="FOLDER",
        help="folder for everything (default: experiments)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the steps of a phase, evaluate if it is asked for, and print the path of the report.

    Raises:
        UserError: a step failed.
    """
    from tinylm.runs.experiments import plan_steps, run_steps

    phase, seeds, folder = arguments.phase, arguments.seeds, arguments.out
    if not 1 <= seeds <= 100:
        raise UserError(
            "--seeds",
            f"must be from 1 to 100, got {seeds}",
            "Give the number of runs of each model",
        )
    steps = plan_steps(folder, seeds)
    logger.info("device: each run reports its own; the evaluation runs on the CPU (small models)")
    outcome = run_steps([step for step in steps if step.phase in RUNS_OF_PHASE[phase]])
    if outcome.stopped:
        return outcome.stopped
    report_folder = folder / "smoke" if phase == "smoke" else folder
    if phase in ("smoke", "eval", "all"):
        from tinylm.runs.compare import evaluate

        compared = [step for step in steps if (step.phase == "smoke") == (phase == "smoke")]
        print(printable(evaluate(compared, report_folder)))
    else:
        print(printable(folder))
        command = ["--phase", "eval", "--seeds", str(seeds), "--out", str(folder)]
        logger.info("next: python -m tinylm experiments %s", shlex.join(command))
    if outcome.failed:
        raise UserError(
            "failed",
            ", ".join(outcome.failed),
            f"See their output in {report_folder / 'output'}. The same command resumes from there",
        )
    return 0
