import codecs
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tinylm.common.errors import printable
from tinylm.text.documents import reject_lone_surrogates

if TYPE_CHECKING:
    pass
# Characters of a stream of text that are encoded together.
ITERATE_CHARACTERS = 2**14

AllowedSpecial = Collection[str] | Literal["all"]


class Tokenizer(ABC):
    """What turns text into ids from 0 to `vocab_size` - 1, and back."""

    kind: str
    vocab_size: int
    eos_id: int
    pad_id: int
    """the eos id where a tokenizer has no token for padding"""
    special_names: dict[int, str]
    """special tokens by id: they never come out of a text and never show in one"""

    def encode(self, text: str, *, allowed_special: AllowedSpecial = ()) -> list[int]:
        """The ids of `text`; text that looks like a special token is text, but for those that are allowed by name.

        What stands between two special tokens is encoded as a text of its own; of special tokens that overlap the longest
        counts.

        Raises:
            UserError: the text has a lone surrogate, or a character that the vocabulary lacks.
            ValueError: a name that is no special token.
        """
        special = self._special_ids(allowed_special)
        if not special:
            return self.encode_batch([text])[0]
        ids: list[int] = []
        for stretch, name in _stretches(text, _pattern_of(special)):
            ids += self.encode_batch([stretch])[0]
            ids += [special[name]] if name else []
        return ids

    def encode_iterable(
        self, texts: Iterable[str], *, allowed_special: AllowedSpecial = ()
    ) -> Iterator[int]:
        """The ids of the texts put together, an open file for example, one by one, as `encode` would give them.

        Memory is bounded by the longest stretch that cannot be cut: nothing for bytes and characters, the longest run of text
        without a space, line end or punctuation for byte-level BPE whose words are known (GPT-2's, GPT-4's, our own). For
        any other tokenizer it is the whole text, or the stretch between two allowed special tokens, because its ids could
        depend on everything before.
        """
        special = self._special_ids(allowed_special)
        rest, enough = "", ITERATE_CHARACTERS
        for stretch, name in _streamed(_pieces(texts), special):
            rest += stretch
            if name:
                yield from self.encode(rest)
                yield special[name]
                rest, enough = "", ITERATE_CHARACTERS
            elif len(rest) >= enough:
                cut = self.last_cut(rest)
                yield from self.encode(rest[:cut])
                rest = rest[cut:]
                enough = max(
                    ITERATE_CHARACTERS, 2 * len(rest)
                )  # so that a text that cannot be cut is not searched too often
        yield from self.encode(rest)

    def _special_ids(self, allowed: AllowedSpecial) -> dict[str, int]:
        ids = {name: id for id, name in self.special_names.items()}
        names = ids if allowed == "all" else allowed
        for name in names:
            if name not in ids:
                raise ValueError(
                    f"allowed_special: '{printable(name)}' is no special token of this tokenizer, which has {', '.join(ids)}"
                )
        return {name: ids[name] for name in names}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text as a 1-D array of an unsigned type: what a corpus is encoded with."""
        for text in texts:
            reject_lone_surrogates(text)
        return self._encode(texts)

    def last_cut(self, text: str) -> int:
        """The last place where `text`, whatever follows it, can be cut so that its parts have its ids; 0 if none is known."""
        return len(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(id) for id in ids).decode("utf-8", "replace")

    def stream(self) -> "StreamDecoder":
        """A decoder that is fed one id at a time; the pieces together are what `decode` gives."""
        return BytesStream(self)

    def byte_lengths(self) -> list[int]:
        """UTF-8 bytes of text that each id stands for, 0 for special tokens."""
        return [
            0 if id in self.special_names else len(self.token_bytes(id))
            for id in range(self.vocab_size)
        ]

    def token_text(self, id: int) -> str:
        r"""How one token is shown to people, on one line: a special token by its name, half a character as `\xe2`."""
        if id in self.special_names:
            return printable(self.special_names[id])
        return printable(self.token_bytes(id).decode("utf-8", "backslashreplace"))

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits that identify this tokenizer: SHA-256 over `to_plain`."""
        return hashlib.sha256(json.dumps(self.to_plain(), sort_keys=True).encode()).hexdigest()[:12]

    @abstractmethod
    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token puts into a text, none for a special token; ValueError for an id that does not exist."""

    @abstractmethod
    def to_plain(self) -> dict[str, Any]:
        """The tokenizer as plain types, for a checkpoint; `tokenizer_from_plain` is its inverse."""

    @abstractmethod
    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_arrays` of texts that are known to be free of lone surrogates."""

    def _check_id(self, id: int) -> None:
        # Without this a negative id would count from the end of a table.
        if not 0 <= id < self.vocab_size:
            raise ValueError(f"token id {id} is outside the tokenizer's 0 to {self.vocab_size - 1}")


def _pattern_of(names: Iterable[str]) -> re.Pattern[str]:
    return re.compile(f"({'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})")


def _stretches(text: str, special: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """The text cut at special tokens: what stands before each and its name; at the end what is left and no name."""
    parts = special.split(text)
    yield from zip(parts[::2], [*parts[1::2], ""], strict=True)


def _streamed(pieces: Iterable[str], names: Collection[str]) -> Iterator[tuple[str, str]]:
    """`_stretches` of all pieces put together; a stretch may come in several parts, which have no name but the last one.

    >>> [part for part in _streamed(["a<", "1><2", ">b"], ["<1>", "<2>"]) if any(part)]
    [('a', '<1>'), ('', '<2>'), ('b', '')]
    """
    if not names:
        yield from ((piece, "") for piece in pieces)
        return
    special, longest = _pattern_of(names), max(map(len, names))
    rest = ""
    for piece in pieces:
        rest += piece
        # Nearer to the end a longer special token may have begun than can be seen.
        while (match := special.search(rest)) and match.start() + longest <= len(rest):
            yield rest[: match.start()], match[0]
            rest = rest[match.end() :]
        sure = max(0, len(rest) - longest + 1)
        yield rest[:sure], ""
        rest = rest[sure:]
    yield from _stretches(rest, special)


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (
            text[start : start + ITERATE_CHARACTERS]
            for start in range(0, len(text), ITERATE_CHARACTERS)
        )


class StreamDecoder(ABC):
    """Turns ids into text one at a time: all that `feed` and then `finish` gave is what `decode` gives for all ids."""

    @abstractmethod
    def feed(self, id: int) -> str:
        """The text that is complete now; nothing while a character is half there."""

    @abstractmethod
    def finish(self) -> str:
        """What was held back; half a character is U+FFFD now."""


class BytesStream(StreamDecoder):
    """For tokenizers whose tokens are bytes: an incremental UTF-8 decoder holds back half characters.

    >>> from tinylm.tokenizer.byte_char import ByteTokenizer
    >>> stream = ByteTokenizer().stream()
    >>> [stream.feed(byte) for byte in "é!".encode()]
    ['', 'é', '!']
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(id))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)
