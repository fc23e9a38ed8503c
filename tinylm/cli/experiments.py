"""`python -m tinylm experiments`: train models that differ in one setting and compare them;
`python -m tinylm experiments ladder`: one recipe at several depths, and the loss of the next one.
"""

import argparse
import logging
import shlex
from pathlib import Path

from tinylm.cli.plot import save_figure
from tinylm.common.errors import UserError, printable
from tinylm.common.files import write_atomic

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
LADDER = "ladder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.usage = (
        "python -m tinylm experiments --phase smoke [--seeds N] [--out FOLDER]\n"
        "       python -m tinylm experiments ladder [section.key=value ...] [--depths LIST] [--seeds N] "
        "[--out FOLDER]"
    )
    parser.description = (
        "Train small models that differ in one setting, compare them, and write a report. "
        "A step that has a result is not run again. ladder: train the model of "
        "configs/experiments/ladder at several depths, fit its loss against compute, and compare "
        "the prediction for the last depth with what is measured."
    )
    parser.add_argument(
        "words", nargs="*", metavar="ladder", help="the word, and settings that override its config"
    )
    parser.add_argument(
        "--depths",
        default="1,2,3,4,5",
        metavar="LIST",
        help="ladder: values of model.depth; the last is predicted from the others, then trained "
        "(default: 1,2,3,4,5)",
    )
    parser.add_argument(
        "--phase",
        choices=tuple(RUNS_OF_PHASE),
        help="smoke: a few steps of each kind of run, without network, and a report; pretrain, finetune: the runs; "
        "eval: their tables, plots and sample texts; all: pretrain, finetune and eval",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="train each of the compared models N times; of a ladder all but the last (default: 1)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("experiments"),
        metavar="FOLDER",
        help="folder for everything (default: experiments)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run a ladder or the steps of a phase.

    Raises:
        UserError: neither or both are asked for, or a step failed.
    """
    words, phase, seeds = arguments.words, arguments.phase, arguments.seeds
    if not 1 <= seeds <= 100:
        raise UserError(
            "--seeds",
            f"must be from 1 to 100, got {seeds}",
            "Give the number of runs of each model",
        )
    if (words[:1] == [LADDER]) == (phase is not None) or (words and words[0] != LADDER):
        problem = "needs a phase, or the word ladder"
        fix = "For example: python -m tinylm experiments --phase smoke"
        raise UserError("experiments", problem, fix)
    if phase is None:
        return run_ladder(arguments)
    return run_phase(phase, seeds, arguments.out)


def run_phase(phase: str, seeds: int, folder: Path) -> int:
    """Run the steps of a phase, evaluate if it is asked for, and print the path of the report.

    Raises:
        UserError: a step failed.
    """
    from tinylm.runs.experiments import SMOKE_TASKS, plan_steps, run_steps, tiny_model_folder

    steps = plan_steps(folder, seeds)
    logger.info("device: each run reports its own; the evaluation runs on the CPU (small models)")
    if phase == "smoke":
        from tinylm.runs.tiny_models import make_tiny_model

        for _, kind, _ in SMOKE_TASKS:
            make_tiny_model(kind, tiny_model_folder(folder, kind))
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


def run_ladder(arguments: argparse.Namespace) -> int:
    """Train the rungs, log their law, train the next size, and print the path of the report.

    Raises:
        UserError: the depths are too few, or a step failed.
    """
    from tinylm.runs import ladder
    from tinylm.runs.experiments import run_steps

    folder, seeds, settings = arguments.out / LADDER, arguments.seeds, arguments.words[1:]
    try:
        depths = sorted(int(word) for word in arguments.depths.split(","))
    except ValueError:
        problem = f"must be whole numbers with commas, got {arguments.depths}"
        raise UserError("--depths", problem, "For example 1,2,3,4") from None
    ladder.require_enough(depths, seeds)
    rungs: list[ladder.Rung] = []
    fit = None
    for part, n_seeds in ((depths[:-1], seeds), (depths[-1:], 1)):
        if rungs:
            fit = ladder.fit_rungs(rungs)
            logger.info(ladder.describe_law(fit))  # before the next size is trained
        steps = ladder.plan_ladder(folder, part, n_seeds, settings)
        outcome = run_steps(steps)
        if outcome.stopped:
            return outcome.stopped
        if outcome.failed:
            fix = f"See their output in {folder / 'output'}. The same command resumes from there"
            raise UserError("failed", ", ".join(outcome.failed), fix)
        rungs += [ladder.read_rung(step) for step in steps]
    *rungs, following = rungs
    logger.info(ladder.describe_next(fit, following))
    write_atomic(folder / "report.md", ladder.report(rungs, following, fit), "--out")
    print(printable(folder / "report.md"))
    save_figure(ladder.draw_ladder(rungs, following, fit), folder / "ladder.png")
    return 0
