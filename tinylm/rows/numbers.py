"""Numbers in answers: the final number, whether two answers agree on it, and how to corrupt one."""

import random
import re
from decimal import Decimal

# A number as people write it: 1,200 or 3.5. Without a sign: in 10-3 the minus is an operator.
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?", re.ASCII)
# The same with its sign. A minus after a digit or a closing bracket subtracts:
# the last number of 10-3 is 3.
_SIGNED_NUMBER = re.compile(r"(?:(?<![0-9)])-\$?|\$-?)?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")


def final_number(text: str) -> Decimal | None:
    """The number after `####`, as in GSM8K's answers (Cobbe et al. 2021),
    else the last number in the text.

    Dollar signs, thousands separators and a final period are ignored.

    >>> final_number("2 boxes cost $6.\\n#### 1,234"), final_number("That makes $-18.50."), final_number("none")
    (Decimal('1234'), Decimal('-18.50'), None)
    """
    _, _, marked = text.partition("####")
    found = _SIGNED_NUMBER.match(marked.lstrip())
    if found is None:
        found = next(reversed(list(_SIGNED_NUMBER.finditer(text))), None)
    return Decimal(re.sub(r"[$,]", "", found[0])) if found else None


def same_number(output: str, target: str) -> bool:
    """Whether both have the same final number; 18 equals 18.00,
    and a text without a number is never right.

    >>> same_number("It is 18.00.", "#### 18"), same_number("eighteen", "#### 18")
    (True, False)
    """
    number = final_number(output)
    return number is not None and number == final_number(target)


def corrupt_number(answer: str, rng: random.Random) -> str | None:
    """The answer with one of its numbers changed; None if it has no number.

    >>> corrupt_number("48 / 2 = 24", random.Random(0))
    '48 / 5 = 24'
    """
    matches = list(NUMBER.finditer(answer))
    if not matches:
        return None
    match = rng.choice(matches)
    return answer[: match.start()] + _nearby_number(match[0], rng) + answer[match.end() :]


def _nearby_number(text: str, rng: random.Random) -> str:
    """A different number near the one in `text`, in the same format: decimals, commas."""
    decimals = len(text.partition(".")[2])
    value = float(text.replace(",", ""))
    step = 10.0**-decimals
    spread = max(3, int(abs(value) / step / 5))
    while True:
        other = value + step * rng.randint(-spread, spread)
        formatted = f"{other:,.{decimals}f}" if "," in text else f"{other:.{decimals}f}"
        if other >= 0 and formatted != text:
            return formatted
