"""Tool calls in texts (data.tools): the model writes an expression, the tool its result.

    the model    There are 4*6=<<4*6=
    the tool                        24>>
    the model                           24 eggs.

These marks are those of GSM8K's rows ("calculator annotations", Cobbe et al. 2021, appendix C).
They are plain text, so that every tokenizer can write them and such rows are read as they are. A
call is << and at most MAX_LENGTH characters of an expression (digits and +-*/().%, spaces) and =;
`cout << x` is none.

What the tool writes, from behind = to >>, is seen and not trained. The texts of the model and of the
tool are encoded each for itself: where the tool begins is the end of a token, in training as in
generation, which generate/tool_text.py does.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from tinylm.common.errors import UserError
from tinylm.rows.calculator import ERROR, MAX_LENGTH, calculate
from tinylm.tokenizer.base import Tokenizer

_OPEN_CALL = rf"<<([0-9+\-*/().% ]{{1,{MAX_LENGTH}}})="
_CALL = re.compile(rf"{_OPEN_CALL}([^<>\n]*)>>")
_CALL_AT_END = re.compile(rf"{_OPEN_CALL}\Z")
# Characters of the longest open call.
LONGEST_CALL = MAX_LENGTH + len("<<=")
# A text with all characters that the tool may write.
_ALL_CHARACTERS = f"-0123456789.{ERROR}>>"


class Call(NamedTuple):
    """A call in a text."""

    expression: str
    result: str
    """as the text has it"""

    @property
    def is_right(self) -> bool:
        """Whether the calculator has the same result, however it is written (24.00)."""
        return calculate(self.result) == calculate(self.expression)


class Part(NamedTuple):
    """A part of an answer."""

    text: str
    by_tool: bool


def calls_in(text: str) -> list[Call]:
    """The calls in a text.

    >>> calls_in("It costs 80-20=$<<80-20=60>>60.")
    [Call(expression='80-20', result='60')]
    """
    return [Call(*found.groups()) for found in _CALL.finditer(text)]


def split_calls(text: str) -> Iterator[Part]:
    """The text in parts, by whom each is written; a part of the model can be empty.

    >>> [part.text for part in split_calls("a <<2+3=5>>5 b")]
    ['a <<2+3=', '5>>', '5 b']
    """
    start = 0
    for found in _CALL.finditer(text):
        yield Part(text[start : found.start(2)], by_tool=False)
        yield Part(text[found.start(2) : found.end()], by_tool=True)
        start = found.end()
    yield Part(text[start:], by_tool=False)


def answer_to_call(text: str) -> str | None:
    """What the tool writes after a text that ends with an open call; None after any other.

    >>> answer_to_call("There are <<6*4="), answer_to_call("6*4=")
    ('24>>', None)
    """
    found = _CALL_AT_END.search(text[-LONGEST_CALL:])
    return None if found is None else f"{calculate(found[1])}>>"


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise a UserError if the tokenizer cannot write what the tool writes."""
    try:
        written = tokenizer.decode(tokenizer.encode(_ALL_CHARACTERS))
    except UserError:
        written = ""
    if written.strip() != _ALL_CHARACTERS:
        problem = f"the tokenizer ({tokenizer.kind}) cannot write {_ALL_CHARACTERS}"
        raise UserError("data.tools", problem, "Remove data.tools, or use another tokenizer")
