"""`tinylm select`: the answers of a model that pass a reward, as rows for finetune.py."""

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylm.common.errors import UserError, printable

if TYPE_CHECKING:
    from tinylm.rewards.answer import Answer
    from tinylm.rewards.selection import Passing

logger = logging.getLogger(__name__)

SUMMARY = "keep a model's own answers that are right, to fine-tune on them"
# The rewards that need no setting.
REWARD_NAMES = ("same_number", "exact", "choice")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.usage = "python -m tinylm select --answers FILE --out FILE [flags]"
    parser.description = (
        "Keep the answers in a file of infer.py --input --output that pass, as JSON lines that "
        "finetune.py reads (rejection sampling). Answers that were cut by their maximum length "
        "never pass, and of equal answers one is kept."
    )
    add = parser.add_argument
    add("--answers", type=Path, required=True, metavar="FILE", help="what infer.py has written")
    add("--out", type=Path, required=True, metavar="FILE", help="the rows, a .jsonl file")
    add("--reward", choices=REWARD_NAMES, help="compare each answer with that of its row")
    add(
        "--target",
        default="completion",
        metavar="KEY",
        help="key of the row's own answer, for --reward (default: completion)",
    )
    add(
        "--verifier",
        type=Path,
        metavar="FILE",
        help="checkpoint of a verifier or a reward model: the highest scores are kept first",
    )
    add("--min-score", type=float, metavar="X", help="with --verifier: only scores of at least X")
    add("--per-prompt", type=int, default=1, metavar="N", help="answers to keep (default: 1)")
    add("--device", default="auto", help="of the verifier: auto, cpu, cuda, mps (default: auto)")


def run(arguments: argparse.Namespace) -> int:
    """Write the rows, print the path of the file and log what was kept.

    Raises:
        UserError: a flag or a line is wrong, or no answer passes.
    """
    from tinylm.common.files import write_atomic
    from tinylm.rewards.selection import answers_in, row_of, select_answers

    check_flags(arguments)
    passing = passing_of(arguments)
    target = arguments.target if arguments.reward is not None else None
    rows: list[dict[str, Any]] = []
    n_lines = n_answers = n_truncated = n_prompts = 0
    for location, line in read_lines(arguments.answers):
        answers = answers_in(line, location, target)
        kept = select_answers(answers, passing, arguments.per_prompt)
        rows += [row_of(line, answer) for answer in kept]
        n_lines, n_answers, n_prompts = (
            n_lines + 1,
            n_answers + len(answers),
            n_prompts + bool(kept),
        )
        n_truncated += sum(answer.truncated for answer in answers)
    logger.info(
        "kept %d answers to %d of %d prompts; %d of %d answers had no end",
        *(len(rows), n_prompts, n_lines, n_truncated, n_answers),
    )
    if not rows:
        fix = "Sample more answers (--n-samples), or raise --max-new-tokens if they have no end"
        raise UserError(("--answers", arguments.answers), "no answer passes", fix)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(arguments.out, text, "--out")
    logger.info(
        "next: python finetune.py --config config_finetune.yaml data.dataset=%s", arguments.out
    )
    print(printable(arguments.out))
    return 0


def check_flags(arguments: argparse.Namespace) -> None:
    """Raise a UserError for flags that do not fit together."""
    if arguments.reward is None and arguments.verifier is None:
        fix = f"Give --reward ({', '.join(REWARD_NAMES)}), --verifier FILE, or both"
        raise UserError("--reward, --verifier", "nothing says which answers pass", fix)
    if arguments.min_score is not None and arguments.verifier is None:
        raise UserError("--min-score", "needs --verifier", "Give --verifier FILE, or remove it")
    if arguments.per_prompt < 1:
        raise UserError("--per-prompt", f"must be at least 1, got {arguments.per_prompt}")
    if arguments.out.suffix != ".jsonl":
        problem = "must end in .jsonl, which finetune.py reads"
        raise UserError(("--out", arguments.out), problem, "Rename it: rows.jsonl")


def passing_of(arguments: argparse.Namespace) -> "Passing":
    """What the flags say an answer needs."""
    from tinylm.common.device import pick_device
    from tinylm.config.finetuning import GrpoConfig, RewardConfig
    from tinylm.eval.reward_scoring import load_scorer
    from tinylm.rewards.selection import Passing
    from tinylm.rewards.table import make_reward

    reward = scores = None
    if arguments.reward is not None:
        reward = make_reward(RewardConfig(reward=arguments.reward), GrpoConfig(), "cpu")
    if arguments.verifier is not None:
        scorer = load_scorer(arguments.verifier, pick_device(arguments.device)[0])

        def scores(answers: Sequence["Answer"]) -> list[float]:
            prompts = [answer.prompt for answer in answers]
            return scorer.score_texts(prompts, [answer.text for answer in answers])

    return Passing(reward, scores, arguments.min_score)


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects in a file of JSON lines, with their locations.

    Raises:
        UserError: the file cannot be read, or a line is no object.
    """
    from tinylm.common.files import read_regular

    for number, text in enumerate(read_regular(path).splitlines(), start=1):
        location = f"{path}:{number}"
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            fix = "If infer.py was killed, run it again: it completes the file"
            raise UserError(location, "not a JSON object", fix)
        yield location, line
