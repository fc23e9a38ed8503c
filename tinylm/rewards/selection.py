"""Rejection sampling: of the answers that a model has written to each prompt, those that pass a
reward become rows for fine-tuning (Yuan et al. 2023; Touvron et al. 2023, Llama 2, section 3.2.3).

    line of infer.py --output ─▶ `answers_in`: an Answer for each text ─▶ `select_answers` ─▶ `row_of`
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinylm.common.errors import UserError
from tinylm.rewards.answer import Answer, Reward
from tinylm.rows.columns import require_text


@dataclass(frozen=True)
class Passing:
    """What an answer needs to be kept."""

    reward: Reward | None
    """at least 1; None: any"""
    scores: Reward | None = None
    """by a verifier or a reward model: the answers with the highest ones are kept; None: the first"""
    min_score: float | None = None
    """and at least this score; None: any"""


def answers_in(line: dict[str, Any], location: str, target: str | None) -> list[Answer]:
    """The answers in a line that infer.py --output has written, empty for a row that failed.

    Args:
        line: the keys of the row, and `completions`.
        location: FILE:LINE, for errors.
        target: the key of the row's own answer; None: the reward does not need it.

    Raises:
        UserError: the line is of another kind, or has no target.
    """
    if "error" in line:
        return []
    if not isinstance(line.get("completions"), list):
        problem = "has no completions" if "checkpoints" not in line else "is of several models"
        fix = "Give a file that infer.py --input --output has written with one --ckpt"
        raise UserError(location, problem, fix)
    expected = ""
    if target is not None:
        if target not in line:
            problem = f"missing: the answer to compare with; the row has {', '.join(line)}"
            raise UserError((location, target), problem, "Give its key: --target KEY")
        expected = require_text(target, line[target])
    return [
        Answer(
            prompt=prompt_of(line),
            text=completion["text"].strip(),
            target=expected,
            location=location,
            n_tokens=len(completion["ids"]),
            truncated=completion["finish_reason"] == "length",
        )
        for completion in line["completions"]
    ]


def prompt_of(line: dict[str, Any]) -> str:
    """The last question of a row."""
    messages = line.get("messages")
    return messages[-1]["content"] if messages is not None else line["prompt"]


def select_answers(answers: Sequence[Answer], passing: Passing, n: int) -> list[Answer]:
    """At most `n` different answers that pass, the best first. An answer without an end never
    passes, nor does an empty one: it would teach to write such answers.
    """
    by_text: dict[str, Answer] = {}
    for answer in answers:
        if answer.text and not answer.truncated:
            by_text.setdefault(answer.text, answer)
    different = list(by_text.values())
    if passing.reward is not None:
        rewards = passing.reward(different)
        different = [one for one, reward in zip(different, rewards, strict=True) if reward >= 1]
    if passing.scores is not None and different:
        scores = passing.scores(different)
        ranked = sorted(zip(scores, different, strict=True), key=lambda pair: -pair[0])
        least = passing.min_score
        different = [one for score, one in ranked if least is None or score >= least]
    return different[:n]


def row_of(line: dict[str, Any], answer: Answer) -> dict[str, Any]:
    """The row that teaches this answer: the prompt or the messages of the line, its system text if
    it has one, and the answer.
    """
    system = {"system": line["system"]} if line.get("system") is not None else {}
    if line.get("messages") is not None:
        reply = {"role": "assistant", "content": answer.text}
        return {**system, "messages": [*line["messages"], reply]}
    return {**system, "prompt": line["prompt"], "completion": answer.text}
