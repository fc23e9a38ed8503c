"""Rewards that compare the text of an answer with that of its row, or look at its form.

    same_number  1 if both end with the same number         "so 12.00" for "#### 12"
    exact        1 if both are the same text
    choice       1 if both choose the same letter           "The answer is (B)." for "B"
    regex        1 if the pattern finds the same in both    answer: (.*)
    format       1 if the whole answer has the pattern      <think>.*</think>.*
    length       0 to -1 for an answer that is too long

All others are 0.
"""

import re
from collections.abc import Callable

from tinylm.rewards.answer import Answer
from tinylm.rows.numbers import same_number

# A letter of a multiple choice alone, in brackets or not: (B), B. or B, but not the article "A" of
# "A cat".
_CHOICE = re.compile(r"(?<![A-Za-z0-9])\(?([A-J])(?:\)|(?=[.,:;!?]|\s*$))(?![A-Za-z0-9])", re.M)


def number_reward(answer: Answer) -> float:
    """1 if the answer ends with the number of its row (`same_number`)."""
    return float(same_number(answer.text, answer.target))


def exact_reward(answer: Answer) -> float:
    """1 if the answer is that of its row, apart from whitespace around it."""
    return float(answer.text.strip() == answer.target.strip())


def choice_reward(answer: Answer) -> float:
    """1 if the last letter that the answer chooses is that of its row."""
    chosen = chosen_letter(answer.text)
    return float(chosen is not None and chosen == chosen_letter(answer.target))


def chosen_letter(text: str) -> str | None:
    """The last letter A to J that stands alone; None if there is none.

    >>> chosen_letter("A cat, so (B)."), chosen_letter("C"), chosen_letter("A cat")
    ('B', 'C', None)
    """
    found = _CHOICE.findall(text)
    return found[-1] if found else None


def regex_reward(pattern: str) -> Callable[[Answer], float]:
    """1 if what the pattern finds last in the answer is what it finds in the answer of the row, or
    all of that if it finds nothing there. Of a pattern with groups, the first group is compared.
    """
    compiled = re.compile(pattern)

    def find(text: str) -> str | None:
        found = list(compiled.finditer(text))
        return (found[-1][min(1, compiled.groups)] or "").strip() if found else None

    def reward(answer: Answer) -> float:
        expected = find(answer.target)
        expected = answer.target.strip() if expected is None else expected
        return float(find(answer.text) == expected)

    return reward


def format_reward(pattern: str) -> Callable[[Answer], float]:
    """1 if the whole answer has the pattern, in which a dot is any character."""
    compiled = re.compile(pattern, re.DOTALL)
    return lambda answer: float(compiled.fullmatch(answer.text) is not None)


def length_reward(free_tokens: int, max_new_tokens: int) -> Callable[[Answer], float]:
    """0 up to `free_tokens` tokens, then falling evenly to -1 at `max_new_tokens`: the soft overlong
    punishment of DAPO (Yu et al. 2025, equation 13).
    """
    width = max(1, max_new_tokens - free_tokens)
    return lambda answer: -min(1.0, max(0, answer.n_tokens - free_tokens) / width)
