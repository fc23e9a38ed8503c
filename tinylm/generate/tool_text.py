"""What a tool writes into a text that is being generated (data.tools, rows/tool_calls.py).

    the model   ... 4*6=<<4*6=        read: the text ends with an open call
    the tool                  24>>    next_token, once for each token; the model reads them as its own
    the model                     24 eggs.

The tool's tokens come one a step, like those of the model, and count as new tokens. They take no
random number and have the log-probability 0, so that a text does not depend on those beside it.
"""

from collections import deque

from tinylm.common.errors import UserError
from tinylm.rows.templates import encode_text
from tinylm.rows.tool_calls import LONGEST_CALL, answer_to_call
from tinylm.tokenizer.base import Tokenizer


class ToolText:
    """The calls in one text.

    >>> from tinylm.tokenizer.byte_char import ByteTokenizer
    >>> text = ToolText(ByteTokenizer())
    >>> for byte in b"<<2+3=":
    ...     text.read(byte)
    >>> bytes(text.next_token() for _ in range(3)), text.has_token
    (b'5>>', False)
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._characters = tokenizer.stream()
        self._end = ""
        self._waiting: deque[int] = deque()

    @property
    def has_token(self) -> bool:
        """Whether the next token is the tool's."""
        return bool(self._waiting)

    def next_token(self) -> int:
        """The next token that the tool writes."""
        token_id = self._waiting.popleft()
        self._end += self._characters.feed(token_id)
        return token_id

    def read(self, token_id: int) -> None:
        """Let the model write a token, which may complete a call."""
        text = self._characters.feed(token_id)
        self._end = (self._end + text)[-LONGEST_CALL:]
        result = answer_to_call(self._end) if text.endswith("=") else None
        if result is not None:
            self._waiting.extend(encode_text(result, self._tokenizer))


def refuse_tools(tools: str | None, way: str, fix: str) -> None:
    """Raise a UserError if the model calls a tool, which this way of generating cannot run."""
    if tools is not None:
        problem = f"the model calls a {tools}, which is not supported with {way}"
        raise UserError("data.tools", problem, fix)
