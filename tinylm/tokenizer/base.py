"""`Tokenizer`: text to ids and back, the interface that every kind of tokenizer has.

Reading order: `Tokenizer`; the search for special tokens in a text, whole or in pieces;
`StreamDecoder`, which returns text while its tokens are still being generated.

Special tokens (end of text, padding, ...) are put between texts by the program. No text is ever
encoded to one: a user who types `<|endoftext|>` gets the characters, unless the caller allows that
token by name. Knows nothing of documents, rows or models.
"""

import codecs
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np

from tinylm.common.errors import printable, reject_lone_surrogates

# Characters of a stream of text that are encoded together.
STREAM_CHARACTERS = 2**14

# End-of-text tokens of published tokenizers, in the order in which they are tried
# if the files of a tokenizer do not name one.
WELL_KNOWN_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")

AllowedSpecial = Collection[str] | Literal["all"]


class Tokenizer(ABC):
    """Encodes text to ids from 0 to `vocab_size` - 1, and decodes them."""

    kind: str
    vocab_size: int
    eos_id: int
    pad_id: int
    """the eos id if a tokenizer has no token for padding"""
    special_names: dict[int, str]
    """special tokens by id: no text is encoded to them, and they decode to nothing"""

    def encode(self, text: str, *, allowed_special: AllowedSpecial = ()) -> list[int]:
        """The ids of `text`; the names of special tokens in it are ordinary text,
        except the allowed ones.

        The text between two special tokens is encoded like a text of its own. If special tokens
        overlap, the longest one counts.

        Raises:
            UserError: the text has a lone surrogate, or a character that is not in the vocabulary.
            ValueError: an allowed name is not a special token.
        """
        if not allowed_special:
            return self.encode_arrays([text])[0].tolist()
        special = self._special_ids(allowed_special)
        ids: list[int] = []
        for stretch, name in _split_at_special(text, _pattern_of(special)):
            ids += self.encode_arrays([stretch])[0].tolist()
            if name:
                ids.append(special[name])
        return ids

    def encode_iterable(
        self, texts: Iterable[str], *, allowed_special: AllowedSpecial = ()
    ) -> Iterator[int]:
        """The ids of the concatenated texts (an open file, for example), one by one,
        as `encode` would return them.

        Memory is bounded by the longest stretch that cannot be cut. For bytes and characters it is
        nothing; for byte-level BPE with known words (GPT-2's, GPT-4's, our own) it is the longest
        run of text without a space, line end or punctuation. For any other tokenizer it is all text
        between two allowed special tokens, because its ids could depend on everything before.
        """
        special = self._special_ids(allowed_special)
        rest, enough = "", STREAM_CHARACTERS
        for stretch, name in _stream_at_special(_pieces(texts), special):
            rest += stretch
            if name:
                yield from self.encode(rest)
                yield special[name]
                rest, enough = "", STREAM_CHARACTERS
            elif len(rest) >= enough:
                cut = self.last_cut(rest)
                yield from self.encode(rest[:cut])
                rest = rest[cut:]
                # Doubling: a text that cannot be cut is not searched again for every piece.
                enough = max(STREAM_CHARACTERS, 2 * len(rest))
        yield from self.encode(rest)

    def _special_ids(self, allowed: AllowedSpecial) -> dict[str, int]:
        ids = {name: id for id, name in self.special_names.items()}
        if allowed == "all":
            return ids
        for name in allowed:
            if name not in ids:
                raise ValueError(
                    f"allowed_special: {name!r} is not a special token of this "
                    f"tokenizer, which has {', '.join(ids)}"
                )
        return {name: ids[name] for name in allowed}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text as a 1-D array of an unsigned type;
        the fastest way to encode a corpus.
        """
        for text in texts:
            reject_lone_surrogates(text)
        return self._encode(texts)

    def last_cut(self, text: str) -> int:
        """The last position where `text`, whatever follows, can be cut without changing its ids;
        0 if not known.
        """
        return len(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(id) for id in ids).decode("utf-8", "replace")

    def stream(self) -> "StreamDecoder":
        """A decoder that takes one id at a time; its pieces together are what `decode` returns."""
        return StreamDecoder(self)

    def byte_lengths(self) -> list[int]:
        """UTF-8 bytes of text of each id, 0 for special tokens."""
        lengths = [len(self.token_bytes(id)) for id in range(self.vocab_size)]
        for id in self.special_names:
            lengths[id] = 0
        return lengths

    def token_text(self, id: int) -> str:
        r"""One token on one line, for people: a special token as its name,
        half a character as `\xe2`.
        """
        if id in self.special_names:
            return printable(self.special_names[id])
        return printable(self.token_bytes(id).decode("utf-8", "backslashreplace"))

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits that identify this tokenizer: SHA-256 over `to_plain`."""
        return hashlib.sha256(json.dumps(self.to_plain(), sort_keys=True).encode()).hexdigest()[:12]

    @abstractmethod
    def token_bytes(self, id: int) -> bytes:
        """The bytes of a token in a text, none for a special token;
        ValueError for an id that does not exist.
        """

    def first_token_bytes(self, id: int) -> bytes:
        """The bytes of a token at the start of a text, where some decoders drop a space."""
        return self.token_bytes(id)

    @abstractmethod
    def to_plain(self) -> dict[str, Any]:
        """The tokenizer as plain types, for a checkpoint."""

    @classmethod
    @abstractmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        """The inverse of `to_plain`; `tokenizer_from_plain` finds the class."""

    @abstractmethod
    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_arrays` of texts without lone surrogates."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process gets it as plain types."""
        return type(self).from_plain, (self.to_plain(),)

    def _check_id(self, id: int) -> None:
        # Without this check a negative id would count from the end of a table.
        if not 0 <= id < self.vocab_size:
            raise ValueError(f"token id {id} is outside the tokenizer's 0 to {self.vocab_size - 1}")


# --- special tokens in a text ---


def _pattern_of(names: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def _split_at_special(text: str, special: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """The text before each special token and the token's name; at the end, the rest and no name."""
    parts = special.split(text)
    yield from zip(parts[::2], [*parts[1::2], ""], strict=True)


def _stream_at_special(pieces: Iterable[str], names: Collection[str]) -> Iterator[tuple[str, str]]:
    """`_split_at_special` of the concatenated pieces; a stretch may come in parts,
    of which only the last has a name.

    >>> [part for part in _stream_at_special(["a<", "1><2", ">b"], ["<1>", "<2>"]) if any(part)]
    [('a', '<1>'), ('', '<2>'), ('b', '')]
    """
    if not names:
        yield from ((piece, "") for piece in pieces)
        return
    special, longest = _pattern_of(names), max(map(len, names))
    rest = ""
    for piece in pieces:
        rest += piece
        # Closer to the end, a longer special token may have begun whose end is in the next piece.
        while (match := special.search(rest)) and match.start() + longest <= len(rest):
            yield rest[: match.start()], match[0]
            rest = rest[match.end() :]
        sure = max(0, len(rest) - longest + 1)
        yield rest[:sure], ""
        rest = rest[sure:]
    yield from _split_at_special(rest, special)


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), STREAM_CHARACTERS):
            yield text[start : start + STREAM_CHARACTERS]


class StreamDecoder:
    """Decodes one id at a time: the text of all `feed`s
    and of `finish` together is what `decode` returns.

    This one is for tokenizers whose tokens are bytes: an incremental UTF-8 decoder holds back half
    characters.

    >>> from tinylm.tokenizer.byte_char import ByteTokenizer
    >>> stream = ByteTokenizer().stream()
    >>> [stream.feed(byte) for byte in "é!".encode()]
    ['', 'é', '!']
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """The text that is complete now; nothing in the middle of a character."""
        return self._decoder.decode(self._tokenizer.token_bytes(id))

    def finish(self) -> str:
        """The text that was held back; half a character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)
