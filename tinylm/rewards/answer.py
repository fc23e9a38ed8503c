"""What a reward is given: an answer with its prompt and the answer of its row."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tinylm.common.errors import UserError


class RewardError(UserError):
    """An answer cannot be scored. The weights are those of the last whole step."""

    saves_first = True


class Answer(NamedTuple):
    """One answer of a model to the prompt of a row."""

    prompt: str
    """the last turn of the user"""
    text: str
    """the answer, without whitespace around it"""
    target: str
    """the answer of the row"""
    location: str
    """of the row, for errors"""
    n_tokens: int
    """the length of the answer, with the token that ends it"""
    truncated: bool
    """whether it reached max_new_tokens without an end"""


Reward = Callable[[Sequence[Answer]], list[float]]
"""one finite number for each answer"""
