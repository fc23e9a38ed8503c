"""The arithmetic behind tool calls: `calculate("48/2")` is "24".

    expression  = term { ("+" | "-") term }
    term        = factor { ("*" | "/") factor }
    factor      = ("+" | "-") factor | ( number | "(" expression ")" ) ["%"]
    number      = digits ["." digits] | "." digits

A parser by recursive descent, one method for each line of the grammar; nothing is ever evaluated as
a program. There is no power and no function, so the size of every value, and the time, are bounded
by the length of the expression. Values are exact fractions; only the result is rounded.

How a call is written in a text is in tool_calls.py.
"""

import re
from fractions import Fraction

# The longest expression of GSM8K's 27,998 calls has 30 characters.
MAX_LENGTH = 100
# Digits of a result before the point, more of which are an error, and after it.
MAX_DIGITS = 15
MAX_PLACES = 4
# What the calculator says where there is no result: a division by zero, 2+*3, too many digits.
ERROR = "error"

# A number or one other character, after any spaces.
_TOKEN = re.compile(r" *(?:(\d+(?:\.\d+)?|\.\d+)|(\S))", re.ASCII)


def calculate(expression: str) -> str:
    """The value of an expression as a decimal, or ERROR; never raises.

    >>> [calculate(text) for text in ("6*4", "2+3*.5", "-(7-9)/3", "50%*8", "1/0", "2+")]
    ['24', '3.5', '0.6667', '4', 'error', 'error']
    """
    if len(expression) > MAX_LENGTH:
        return ERROR
    try:
        value = _Parser(expression).parse()
    except (_SyntaxError, ZeroDivisionError):
        return ERROR
    return _decimal(value)


def _decimal(value: Fraction) -> str:
    """At most MAX_PLACES digits after the point, a tie to the even one, without zeros at the end."""
    units = round(value * 10**MAX_PLACES)
    whole, part = divmod(abs(units), 10**MAX_PLACES)
    if whole >= 10**MAX_DIGITS:
        return ERROR
    text = f"{whole}.{part:0{MAX_PLACES}}".rstrip("0").rstrip(".")
    return f"-{text}" if units < 0 else text


class _SyntaxError(Exception):
    """The text is not an expression."""


class _Parser:
    """Reads an expression from left to right, one token ahead."""

    def __init__(self, text: str):
        self._tokens = [number or symbol for number, symbol in _TOKEN.findall(text)]
        self._tokens.append("")  # the end, which no rule takes
        self._place = 0

    def parse(self) -> Fraction:
        """The value of the whole text."""
        value = self._expression()
        if self._next():
            raise _SyntaxError
        return value

    def _expression(self) -> Fraction:
        value = self._term()
        while sign := self._take("+", "-"):
            term = self._term()
            value = value + term if sign == "+" else value - term
        return value

    def _term(self) -> Fraction:
        value = self._factor()
        while sign := self._take("*", "/"):
            factor = self._factor()
            value = value * factor if sign == "*" else value / factor
        return value

    def _factor(self) -> Fraction:
        if sign := self._take("+", "-"):
            value = self._factor()
            return value if sign == "+" else -value
        if self._take("("):
            value = self._expression()
            if not self._take(")"):
                raise _SyntaxError
        else:
            value = self._number()
        return value / 100 if self._take("%") else value

    def _number(self) -> Fraction:
        token = self._next()
        if not (token.isascii() and token[-1:].isdigit()):
            raise _SyntaxError
        self._place += 1
        return Fraction(token)

    def _next(self) -> str:
        return self._tokens[self._place]

    def _take(self, *symbols: str) -> str:
        """The next token, which is passed, if it is one of `symbols`; else nothing."""
        token = self._next()
        if token not in symbols:
            return ""
        self._place += 1
        return token
