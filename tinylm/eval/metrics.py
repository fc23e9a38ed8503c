"""Scores of answers against targets. Knows nothing of models, tasks or files.

In reading order: the score of one answer (`exact_match`, `token_f1`, `rouge`; numbers are in
rows/numbers.py), and of many answers together (`macro_f1`), with a 95% interval.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from tinylm.common.errors import UserError
from tinylm.common.statistics import N_RESAMPLES, Measure, middle_95

ROUGE_TYPES = {"rouge1": "rouge1", "rouge2": "rouge2", "rougel": "rougeL"}


def exact_match(output: str, target: str) -> bool:
    """Whether two texts are equal, ignoring whitespace around them."""
    return output.strip() == target.strip()


def token_f1(output: str, target: str) -> float:
    """Harmonic mean of precision and recall of words, ignoring order,
    case and punctuation (Rajpurkar et al. 2016).

    >>> token_f1("the cat sat", "The cat sat down."), token_f1("", "x")
    (0.8571428571428571, 0.0)
    """
    output_words = Counter(re.findall(r"\w+", output.casefold()))
    target_words = Counter(re.findall(r"\w+", target.casefold()))
    n_common = (output_words & target_words).total()
    return 2 * n_common / (output_words.total() + target_words.total()) if n_common else 0.0


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
        fix = 'Install it: pip install "rouge-score>=0.1.2,<1"'
        raise UserError("ROUGE", "needs the package rouge-score", fix) from None
    return RougeScorer(list(ROUGE_TYPES.values()))


def macro_f1(outputs: Sequence[str], targets: Sequence[str], *, seed: int = 0) -> Measure:
    """The unweighted mean of the F1 of each label, and its bootstrap interval.

    Labels are all that occur in outputs or targets; one that is never predicted, or never right,
    has F1 0.
    """
    labels, codes = np.unique([*outputs, *targets], return_inverse=True)
    predicted, expected = np.split(codes, 2)
    # The confusion matrix, flat: (L * L,), targets in rows.
    cells = np.bincount(expected * len(labels) + predicted, minlength=len(labels) ** 2)
    # To resample examples with replacement is to resample their cells: a multinomial draw.
    rng = np.random.default_rng(seed)
    resampled = rng.multinomial(len(targets), cells / len(targets), size=N_RESAMPLES)
    value = float(_f1_of_cells(cells[None])[0])
    return Measure(value, *middle_95(_f1_of_cells(resampled)))


def _f1_of_cells(cells: np.ndarray) -> np.ndarray:
    """Macro-F1 (R,) of each of R flat confusion matrices (R, L * L): targets in rows,
    outputs in columns.
    """
    size = math.isqrt(cells.shape[1])
    matrices = cells.reshape(-1, size, size)  # (R, L, L)
    n_right = matrices.diagonal(axis1=1, axis2=2)  # (R, L)
    n_seen = matrices.sum(axis=1) + matrices.sum(axis=2)  # (R, L) as output plus as target
    f1 = np.divide(2 * n_right, n_seen, out=np.zeros(n_seen.shape), where=n_seen > 0)
    return f1.sum(axis=1) / (n_seen > 0).sum(axis=1)
