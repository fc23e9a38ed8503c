"""Scores of texts, and how sure they are: knows nothing of models, tasks or files.

In reading order: what one answer is worth (`exact_match`, `final_number`, `token_f1`, `rouge`), what many are worth together
(`macro_f1`, `mean`), each with its 95% interval as a `Measure`.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from tinylm.common.errors import UserError
from tinylm.common.statistics import RESAMPLES, Measure, _middle_95

ROUGE_TYPES = {"rouge1": "rouge1", "rouge2": "rouge2", "rougel": "rougeL"}


def exact_match(output: str, target: str) -> bool:
    """Whether two texts are the same but for white space around them."""
    return output.strip() == target.strip()


def token_f1(output: str, target: str) -> float:
    """Harmonic mean of precision and recall of the words, whatever their order, case and punctuation (Rajpurkar et al. 2016).

    >>> token_f1("the cat sat", "The cat sat down."), token_f1("", "x")
    (0.8571428571428571, 0.0)
    """
    given, wanted = (Counter(re.findall(r"\w+", text.casefold())) for text in (output, target))
    common = (given & wanted).total()
    return 2 * common / (given.total() + wanted.total()) if common else 0.0


def rouge(output: str, target: str) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), without stemming.

    Raises:
        UserError: rouge-score is not installed.
    """
    scores = _rouge_scorer().score(target, output)
    return {name: scores[kind].fmeasure for name, kind in ROUGE_TYPES.items()}


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError(
            'ROUGE needs rouge-score. Install it: pip install "rouge-score>=0.1.2,<1"'
        ) from None
    return RougeScorer(list(ROUGE_TYPES.values()))


def macro_f1(outputs: Sequence[str], targets: Sequence[str], *, seed: int = 0) -> Measure:
    """The mean over labels of their F1, each label counting the same, and its bootstrap interval.

    The labels are those that occur among outputs or targets; one that is never given or never right has F1 0.
    """
    labels, codes = np.unique([*outputs, *targets], return_inverse=True)
    given, wanted = np.split(codes, 2)
    cells = np.bincount(
        wanted * len(labels) + given, minlength=len(labels) ** 2
    )  # the confusion matrix, flat
    # Drawing n examples with replacement is drawing their cells.
    draws = np.random.default_rng(seed).multinomial(
        len(targets), cells / len(targets), size=RESAMPLES
    )
    return Measure(float(_f1_of_cells(cells[None])[0]), *_middle_95(_f1_of_cells(draws)))


def _f1_of_cells(cells: np.ndarray) -> np.ndarray:
    """Macro-F1 of each flat confusion matrix (R, L * L): targets in rows, outputs in columns."""
    size = math.isqrt(cells.shape[1])
    matrices = cells.reshape(-1, size, size)
    right = matrices.diagonal(axis1=1, axis2=2)
    seen = matrices.sum(axis=1) + matrices.sum(
        axis=2
    )  # a label's share of the outputs and of the targets
    f1 = np.divide(2 * right, seen, out=np.zeros(seen.shape), where=seen > 0)
    return f1.sum(axis=1) / (seen > 0).sum(axis=1)
