"""training.duration: how long a run is, in the unit that its user thinks in.

    20min · 90s · 2h · 3 epochs · 200M tokens · 20 tokens_per_parameter · 1e17 flops

Only the text is read here. How many optimizer steps a duration is depends on the data, the model or
the machine: `training/settle.py` decides it once, before step 1.
"""

import math
import re
from typing import Any, NamedTuple

_SECONDS = {"s": 1, "min": 60, "h": 3600}
_LETTERS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
# The units other than time; a number of one of them may end with a letter of `_LETTERS`.
_COUNTS = {
    "epoch": "epochs",
    "epochs": "epochs",
    "tokens": "tokens",
    "tokens_per_parameter": "tokens_per_parameter",
    "flops": "flops",
}
_TEXT = re.compile(r"(\d+\.?\d*(?:[eE][+-]?\d+)?)\s*(?:(s|min|h)|([kMGBT]?)\s*([a-z_]+))")


class Budget(NamedTuple):
    """A duration as a number of one unit."""

    amount: float
    unit: str
    """seconds, epochs, tokens, tokens_per_parameter or flops"""


def read_duration(text: str) -> Budget | None:
    """The budget that `text` names; None if it is not a duration.

    An epoch is a pass over the training data. Tokens are positions of rows, flops those of
    `flops_per_token` in tinylm/model/decoder.py.

    >>> read_duration("20min"), read_duration("1e17 flops")
    (Budget(amount=1200.0, unit='seconds'), Budget(amount=1e+17, unit='flops'))
    >>> read_duration("200M tokens").amount, read_duration("3 weeks"), read_duration("0 epochs")
    (200000000.0, None, None)
    """
    found = _TEXT.fullmatch(text.strip())
    if found is None:
        return None
    number, of_time, letter, of_count = found.groups()
    if of_time is None and of_count not in _COUNTS:
        return None
    factor = _LETTERS[letter] if of_time is None else _SECONDS[of_time]
    amount = float(number) * factor
    if not 0 < amount < math.inf:
        return None
    return Budget(amount, _COUNTS[of_count] if of_time is None else "seconds")


def budget_of(config: Any) -> Budget:
    """What training.duration of a `Config` says; its rules have checked that it can be read."""
    budget = read_duration(config.training.duration)
    assert budget is not None
    return budget
