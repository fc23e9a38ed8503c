import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylm.common.errors import UserError, printable
from tinylm.config.yaml_file import read_list
from tinylm.eval.task_scores import _result_or_error
from tinylm.generate.engine import Engine
from tinylm.generate.scoring import (
    Continuation,
    ContinuationScore,
    encode_continuation,
    score_continuations,
)


@dataclass(frozen=True)
class Case:
    """A prompt and the text that should follow it, to the character: a target that is a new word begins with its space."""

    name: str
    prompt: str
    target: str


@dataclass(frozen=True)
class CaseScore:
    """What a model makes of a case: a score, or why there is none, which counts as a failure."""

    case: Case
    score: ContinuationScore | None
    error: str | None

    def row(self) -> dict[str, Any]:
        """The numbers as plain values."""
        row = {"case": self.case.name, "prompt": self.case.prompt, "target": self.case.target}
        names = (
            "log_prob",
            "first_log_prob",
            "first_rank",
            "n_tokens",
            "greedy_match",
            "prompt_perplexity",
        )
        score = self.score
        numbers = (
            (
                score.log_prob,
                score.log_probs[0],
                score.ranks[0],
                score.n_tokens,
                score.greedy_match,
                score.prompt_perplexity,
            )
            if score
            else (None,) * 6
        )
        return {**row, **dict(zip(names, numbers, strict=True)), "error": self.error}


@dataclass(frozen=True)
class CasesSummary:
    """What a model makes of all cases."""

    n_cases: int
    n_failed: int
    """cases without a score: the target cannot be encoded, or fills the context"""
    n_greedy: int
    """cases whose target is what the model would write"""
    log_prob: float | None
    """mean over the scored cases of the log-probability of the whole target; None where there is none"""
    first_rank: float | None
    """median over all cases of the rank of the target's first token, that of a failed one beyond all; None where it is"""
    prompt_perplexity: float | None
    """geometric mean over the prompts"""

    @classmethod
    def of(cls, scores: Sequence[CaseScore]) -> "CasesSummary":
        """The summary of at least one case."""
        scored = [item.score for item in scores if item.score is not None]
        perplexities = [
            score.prompt_perplexity for score in scored if score.prompt_perplexity is not None
        ]
        rank = statistics.median(
            math.inf if item.score is None else item.score.ranks[0] for item in scores
        )
        return cls(
            n_cases=len(scores),
            n_failed=len(scores) - len(scored),
            n_greedy=sum(score.greedy_match for score in scored),
            log_prob=statistics.fmean(score.log_prob for score in scored) if scored else None,
            first_rank=rank if math.isfinite(rank) else None,
            prompt_perplexity=statistics.geometric_mean(perplexities) if perplexities else None,
        )

    @property
    def worth(self) -> tuple[int, float]:
        """What checkpoints are ranked by, more being better: fewer failed cases first, then more probable targets, as far as they are shown."""
        return -self.n_failed, -math.inf if self.log_prob is None else round(self.log_prob, 4)


def read_cases(path: Path) -> tuple[Case, ...]:
    """The cases in a YAML file: a list of name, prompt and target.

    Raises:
        UserError: naming the file, the line and the key.
    """
    cases: dict[str, Case] = {}
    for place, item in read_list(path):
        for key in ("name", "prompt", "target"):
            if not isinstance(item.get(key), str):
                found = "nothing" if key not in item else printable(repr(item[key]))[:60]
                raise UserError(
                    f"{place}: {key}: expected text, found {found}. Each case has name, prompt and target; quote a number."
                )
        if unknown := item.keys() - {"name", "prompt", "target"}:
            raise UserError(
                f"{place}: {printable(min(unknown))}: no such key. A case has name, prompt and target."
            )
        if not item["target"]:
            raise UserError(
                f"{place}: target: it is empty. Write the text that should follow the prompt."
            )
        if item["name"] in cases:
            raise UserError(
                f"{place}: name: {printable(item['name'])} stands above already. Give each case a name of its own."
            )
        cases[item["name"]] = Case(**item)
    return tuple(cases.values())


def evaluate_cases(
    engine: Engine, cases: Sequence[Case], *, batch_size: int = 16
) -> list[CaseScore]:
    """The score of every case, in order; one that this model cannot be asked has the reason in its place."""
    pairs = [
        _result_or_error(lambda case=case: encode_continuation(engine, case.prompt, case.target))
        for case in cases
    ]
    scores = iter(
        score_continuations(
            engine,
            [pair for pair in pairs if isinstance(pair, Continuation)],
            batch_size=batch_size,
        )
    )
    asked = zip(cases, pairs, strict=True)
    return [
        CaseScore(case, next(scores), None)
        if isinstance(pair, Continuation)
        else CaseScore(case, None, str(pair))
        for case, pair in asked
    ]
