"""Sums worked out a digit at a time, as at school: right, or with one mistake.

    work_out(38, "*", 7)                 8*7=56, 3*7+5=26      266
    work_out(38, "*", 7, write=slip)     8*7=54, 3*7+5=26      264     a mistake, followed through

Every number that is written goes through `write`, which may change it. `Slip` changes one of them,
and what comes after it is computed with the wrong number: only the fact itself says that it is wrong.
"""

import random
from collections.abc import Callable
from typing import Literal

Operator = Literal["+", "-", "*", "/"]
# The result of a fact of the tables (8*7=56), a number copied from the question, or the result
# that is put together from digits.
Kind = Literal["fact", "copy", "result"]
# How frequent each kind of mistake is.
KINDS: dict[Kind, float] = {"fact": 0.8, "copy": 0.1, "result": 0.1}
# More than an answer has facts.
N_PLACES = 10
# How far a wrong number is from the right one, in half of the mistakes; the others are anywhere.
NEAR = (-10, -3, -2, -1, 1, 2, 3, 10)
Write = Callable[[int, int, Kind], int]


def write_right(number: int, limit: int, kind: Kind) -> int:
    """The number itself."""
    return number


class Slip:
    """A `write` with a mistake: the number `place` of this kind becomes another one below `limit`.

    >>> slip = Slip("fact", 1, random.Random(2))
    >>> slip(56, 70, "fact"), slip(26, 70, "fact"), slip(26, 70, "fact")
    (56, 7, 26)
    """

    def __init__(self, kind: Kind, place: int, rng: random.Random):
        self.kind, self.place, self.rng = kind, place, rng
        self.n_seen = 0

    def __call__(self, number: int, limit: int, kind: Kind) -> int:
        if kind != self.kind:
            return number
        self.n_seen += 1
        if self.n_seen - 1 != self.place:
            return number
        if kind != "fact":
            return self._other_digit(number)
        others = [number + change for change in NEAR] if self.rng.random() < 0.5 else range(limit)
        return self.rng.choice([n for n in others if n != number and 0 <= n < limit])

    def _other_digit(self, number: int) -> int:
        """The number with another digit at one place, which is not a 0 at its start."""
        digits = list(str(number))
        place = self.rng.randrange(len(digits))
        digits[place] = self.rng.choice([d for d in "123456789" if d != digits[place]])
        return int("".join(digits))


def work_out(
    first: int, operator: Operator, second: int, write: Write = write_right
) -> tuple[list[str], int]:
    """The facts that lead to the result of `first operator second`, and the result.

    >>> work_out(472, "+", 385), work_out(472, "-", 385)
    ((['2+5=7', '7+8=15', '4+3+1=8'], 857), (['12-5=7', '17-8-1=8', '4-3-1=0'], 87))
    >>> work_out(38, "*", 7), work_out(266, "/", 7)
    ((['8*7=56', '3*7+5=26'], 266), (['2/7=0r2', '26/7=3r5', '56/7=8r0'], 38))
    """
    work = {"+": _add, "-": _subtract, "*": _multiply, "/": _divide}[operator]
    facts, result = work(first, second, write)
    return facts, write(result, 0, "result")


def _digits(number: int, n: int = 0) -> list[int]:
    """The digits from the last to the first, with zeros up to `n` of them."""
    return [int(digit) for digit in reversed(str(number).zfill(n))]


def _add(first: int, second: int, write: Write) -> tuple[list[str], int]:
    facts, result, carry = [], 0, 0
    n = max(len(str(first)), len(str(second)))
    for place in range(n):
        a, b = _digits(first, n)[place], _digits(second, n)[place]
        total = write(a + b + carry, 20, "fact")
        facts.append(f"{a}+{b}{'+1' * carry}={total}")
        result += total % 10 * 10**place
        carry = total // 10
    return facts, result + carry * 10**n


def _subtract(first: int, second: int, write: Write) -> tuple[list[str], int]:
    facts, result, borrow = [], 0, 0
    n = len(str(first))
    for place in range(n):
        a, b = _digits(first)[place], _digits(second, n)[place]
        borrow_before, borrow = borrow, int(a - b - borrow < 0)
        before = a + 10 * borrow
        digit = write(before - b - borrow_before, 10, "fact")
        facts.append(f"{before}-{b}{'-1' * borrow_before}={digit}")
        result += digit * 10**place
    return facts, result


def _multiply(first: int, second: int, write: Write) -> tuple[list[str], int]:
    facts, result, carry = [], 0, 0
    digits = _digits(first)
    for place, a in enumerate(digits):
        total = write(a * second + carry, 10 * second, "fact")
        facts.append(f"{a}*{second}{f'+{carry}' if carry else ''}={total}")
        result += total % 10 * 10**place
        carry = total // 10
    return facts, result + carry * 10 ** len(digits)


def _divide(first: int, second: int, write: Write) -> tuple[list[str], int]:
    facts, result, rest = [], 0, 0
    for digit in str(first):
        here = 10 * rest + int(digit)
        # a wrong quotient or rest is that of another number
        quotient, rest = divmod(write(here, 10 * second, "fact"), second)
        facts.append(f"{here}/{second}={quotient}r{rest}")
        result = 10 * result + quotient
    return facts, result
