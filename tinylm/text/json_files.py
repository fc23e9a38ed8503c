"""The items of the list in a .json file, one at a time: memory holds one item, or one block."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tinylm.common.errors import UserError

BLOCK_BYTES = 2**20
# A longer item is no document or row.
ITEM_CHARACTERS = 2**29
BLANKS = re.compile(r"[ \t\n\r]*")
# An error that is further from the end of the text than the longest token without quotes, or half
# of a \uXXXX pair, does not come from the end of a block.
TOKEN_CHARACTERS = 32
_KINDS = {"{": "an object", '"': "a string", "n": "null", "t": "a boolean", "f": "a boolean"}
_KINDS |= dict.fromkeys("-0123456789", "a number")
_decoder = json.JSONDecoder()


def array_items(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """The items of a list with their location for errors; nothing for an empty file.

    Args:
        path: the name of the file.
        file: its content, from the start.

    Raises:
        UserError: it is not UTF-8 text, not JSON, or not a list.
    """
    text = _Window(_decoded(path, file))
    opening = text.next_character()
    if not opening:
        return
    if opening != "[":
        if opening not in _KINDS:
            raise _not_json(path, "Expecting value")
        problem = f"must be a list of objects, got {_KINDS[opening]}"
        raise UserError(path, problem, "Write [{...}, {...}], or one object per line as .jsonl")
    text.place += 1
    number = 0
    before, after = "", text.next_character()
    while after != "]" or before == ",":
        number += 1
        where = f"{path}: row {number}"
        try:
            item = text.value()
        except json.JSONDecodeError as error:
            raise _not_json(where, error.msg) from None
        except RecursionError:
            raise _not_json(where, "lists or objects inside each other too deep") from None
        if item is _TOO_LONG:
            problem = f"more than {ITEM_CHARACTERS} characters"
            raise UserError(where, problem, "Is it a document? Cut it")
        yield where, item
        before = text.next_character()
        if before not in (",", "]"):
            raise _not_json(where, "Expecting ',' or ']' after it")
        if before == ",":
            text.place += 1
        after = text.next_character() if before == "," else before
    text.place += 1
    if text.next_character():
        raise _not_json(path, "Extra data after the list")


def _not_json(where: object, problem: str) -> UserError:
    fix = "Correct the file; with one object per line it must be named .jsonl"
    return UserError(where, f"not JSON: {problem}", fix)


def _decoded(path: Path, file: BinaryIO) -> Iterator[str]:
    """The text in blocks, without a byte-order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    n_read = 0
    while True:
        block = file.read(BLOCK_BYTES)
        n_pending = len(decoder.getstate()[0])
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 text (byte {n_read - n_pending + error.start})"
            raise UserError(path, problem, "Save the file as UTF-8") from None
        if not block:
            return
        n_read += len(block)


_TOO_LONG = object()


class _Window:
    """The part of a text that is held, and the place in it up to which it was read."""

    def __init__(self, blocks: Iterator[str]):
        self._blocks = blocks
        self._text = ""
        self.place = 0

    def next_character(self) -> str:
        """The next character that is not blank, which stays unread; "" at the end."""
        while True:
            found = BLANKS.match(self._text, self.place)
            assert found is not None, "the pattern matches an empty text"
            self.place = found.end()
            if self.place < len(self._text):
                return self._text[self.place]
            if not self._grow():
                return ""

    def value(self) -> Any:
        """The value at the place, which moves after it; `_TOO_LONG` if it is.

        Raises:
            JSONDecodeError: there is none.
        """
        while True:
            try:
                value, end = _decoder.raw_decode(self._text, self.place)
            except json.JSONDecodeError as error:
                inside = error.pos < len(self._text) - TOKEN_CHARACTERS
                if inside and not error.msg.startswith("Unterminated string"):
                    raise
                if len(self._text) - self.place > ITEM_CHARACTERS:
                    return _TOO_LONG
                if not self._grow():
                    raise
                continue
            # 1 and 1. at the end of a block may be the start of 1.5
            is_number = isinstance(value, int | float)
            whole = end + TOKEN_CHARACTERS * is_number < len(self._text)
            if whole or not self._grow():
                self.place = end
                return value

    def _grow(self) -> bool:
        """Read at least as much as is unread, so that the work on a long item stays linear;
        whether there was more.
        """
        unread = self._text[self.place :]
        parts = []
        n_read = 0
        for block in self._blocks:
            parts.append(block)
            n_read += len(block)
            if n_read > len(unread):
                break
        if not n_read:
            return False
        self._text = "".join((unread, *parts))
        self.place = 0
        return True
