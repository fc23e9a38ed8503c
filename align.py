"""Alignment: pretraining, fine-tuning, preferences and a verifier in one command,
then their models side by side.

    python align.py --config configs/align-smoke.yaml
    python align.py --config configs/align.yaml

    read     a YAML list of stages, each a config that also runs by itself  training/pipeline.py
    make     the data that the list begins with, if it names some           training/made_data.py
    run      each stage as a process of its own, unless it is already done  training/pipeline_run.py
    compare  every model on the same held-out data and the same prompts     training/side_by_side.py
    test     every model on the same held-out questions, if it names some   training/held_out.py

Each stage resumes exactly, because its program does: run the same command again after a crash.
"""

import argparse
import logging
import shlex
import sys
from pathlib import Path

from tinylm.cli.program import Parser, run_program
from tinylm.common.errors import printable

logger = logging.getLogger("training.align")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python align.py",
        usage="python align.py --config configs/align-smoke.yaml [section.key=value ...]",
        description="Run all stages of alignment and compare their models. "
        "The same command again continues where it stopped.",
    )
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        help="YAML file: a list of stages, each with stage and config",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings that override the configs of all stages",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for state.json, results.json and report.md (default: checkpoints/ and the "
        "name of the config)",
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    args = parse(argv)
    return run_program(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    """Run the stages that are not done, compare their models, report."""
    from tinylm.checkpoint.format import RunLock
    from tinylm.cli.results import print_rows
    from tinylm.common.child_program import ChildProgram, forward_signals
    from tinylm.rows.conversation import CHAT_STAGES
    from training import held_out, side_by_side
    from training.made_data import make_data
    from training.pipeline import read_stages, results_folder
    from training.pipeline_run import PipelineState, run_stages

    stages = read_stages(args.config, args.overrides)
    test = held_out.read_test(args.config)
    out = results_folder(args.out or Path("checkpoints") / args.config.stem, stages)
    with RunLock(out, "--out"):
        state = PipelineState.read(out / "state.json")
        make_data(args.config)
        child = ChildProgram()
        with forward_signals(child):
            code = run_stages(stages, state, child)
        if code:
            return code
        weights = state.digest(stage.name for stage in stages)
        results = side_by_side.results_of(out, stages, weights, test)
    print_rows(side_by_side.table_rows(results))
    if test is not None:
        print(f"\n{results['test']['n']:,} held-out questions of {printable(test.path)}")
        print_rows(held_out.terminal_rows(results["test"]))
    for line in (*side_by_side.notes_on(results), *side_by_side.sample_lines(results, stages)):
        print(line)
    print(f"report: {printable(out / 'report.md')}")
    chats = [stage.model for stage in stages if stage.kind in CHAT_STAGES]
    if chats:
        logger.info("next: python infer.py --ckpt %s --chat", shlex.quote(str(chats[-1])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
