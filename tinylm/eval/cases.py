"""Cases: a prompt and the text that should follow it. How probable is the right continuation?

    cases/*.yaml ─▶ Case (`read_cases`) ─▶ CaseScore of each (`evaluate_cases`) ─▶ CasesSummary

A case that cannot be scored counts as a failure, so that no checkpoint gains by it.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylm.common.errors import UserError
from tinylm.config.yaml_file import read_list
from tinylm.generate.engine import Engine
from tinylm.generate.scoring import ContinuationScore, encode_continuation, score_continuations


@dataclass(frozen=True)
class Case:
    """A prompt and its exact continuation: a target that begins with a word begins with a space."""

    name: str
    prompt: str
    target: str


@dataclass(frozen=True)
class CaseScore:
    """The score of a case, or the reason why it has none, which counts as a failure."""

    case: Case
    score: ContinuationScore | None
    error: str | None

    def row(self) -> dict[str, Any]:
        """The numbers as plain values, for a table."""
        score = self.score
        return {
            "case": self.case.name,
            "prompt": self.case.prompt,
            "target": self.case.target,
            "log_prob": score and score.log_prob,
            "first_log_prob": score and score.log_probs[0],
            "first_rank": score and score.ranks[0],
            "n_tokens": score and score.n_tokens,
            "greedy_match": score and score.greedy_match,
            "prompt_perplexity": score and score.prompt_perplexity,
            "error": self.error,
        }


@dataclass(frozen=True)
class CasesSummary:
    """The scores of all cases of a file together."""

    n_cases: int
    n_failed: int
    """cases without a score: the target cannot be encoded, or fills the context"""
    n_greedy: int
    """cases whose target is the greedy continuation"""
    log_prob: float | None
    """mean log-probability of the targets, over scored cases; None if there are none"""
    first_rank: float | None
    """median rank of the first target token, failed cases beyond all others;
    None if that is the median"""
    prompt_perplexity: float | None
    """geometric mean over the prompts"""

    @classmethod
    def of(cls, scores: Sequence[CaseScore]) -> "CasesSummary":
        """The summary of at least one case."""
        scored = [item.score for item in scores if item.score is not None]
        perplexities = []
        for score in scored:
            if score.prompt_perplexity is not None:
                perplexities.append(score.prompt_perplexity)
        ranks = [math.inf if item.score is None else item.score.ranks[0] for item in scores]
        rank = statistics.median(ranks)
        return cls(
            n_cases=len(scores),
            n_failed=len(scores) - len(scored),
            n_greedy=sum(score.greedy_match for score in scored),
            log_prob=statistics.fmean(score.log_prob for score in scored) if scored else None,
            first_rank=rank if math.isfinite(rank) else None,
            prompt_perplexity=statistics.geometric_mean(perplexities) if perplexities else None,
        )

    @property
    def rank_key(self) -> tuple[int, float]:
        """What checkpoints are ranked by, more is better: fewer failures, then more probable
        targets, as displayed.
        """
        return -self.n_failed, -math.inf if self.log_prob is None else round(self.log_prob, 4)


def read_cases(path: Path) -> tuple[Case, ...]:
    """The cases in a YAML file: a list of name, prompt and target.

    Raises:
        UserError: the file is not such a list; `where` has the file, the line and the key.
    """
    cases: dict[str, Case] = {}
    for location, item in read_list(path):
        for key in ("name", "prompt", "target"):
            if not isinstance(item.get(key), str):
                got = "nothing" if key not in item else repr(item[key])[:60]
                fix = "Each case has name, prompt and target; quote numbers"
                raise UserError((location, key), f"must be text, got {got}", fix)
        if unknown := item.keys() - {"name", "prompt", "target"}:
            fix = "A case has name, prompt and target"
            raise UserError((location, min(unknown)), "unknown key", fix)
        if not item["target"]:
            fix = "Write the text that should follow the prompt"
            raise UserError((location, "target"), "must not be empty", fix)
        if item["name"] in cases:
            problem = f"{item['name']} is used by another case"
            raise UserError((location, "name"), problem, "Give each case a different name")
        cases[item["name"]] = Case(**item)
    return tuple(cases.values())


def evaluate_cases(
    engine: Engine, cases: Sequence[Case], *, batch_size: int = 16
) -> list[CaseScore]:
    """The score of every case, in order; a case that this model cannot be asked has the reason
    instead.
    """
    continuations = []
    errors: dict[int, str] = {}
    for number, case in enumerate(cases):
        try:
            continuations.append(encode_continuation(engine, case.prompt, case.target))
        except UserError as error:  # must not end the other cases
            errors[number] = str(error)
    scores = iter(score_continuations(engine, continuations, batch_size=batch_size))
    found = []
    for number, case in enumerate(cases):
        score = None if number in errors else next(scores)
        found.append(CaseScore(case, score, errors.get(number)))
    return found
