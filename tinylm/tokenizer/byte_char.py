"""The two tokenizers that need no merges: bytes, and the characters of a text."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tinylm.common.errors import UserError
from tinylm.tokenizer.base import Tokenizer


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, four special tokens, and those that are added after them: no training,
    no unknown text, long sequences.

    >>> ByteTokenizer().encode("aé")
    [97, 195, 169]
    """

    kind = "byte"
    vocab_size = 260

    pad_id, bos_id, eos_id, sep_id = 256, 257, 258, 259
    special_names = {256: "<|pad|>", 257: "<|bos|>", 258: "<|eos|>", 259: "<|sep|>"}
    added: tuple[str, ...] = ()
    """special tokens after these"""

    def token_bytes(self, id: int) -> bytes:
        self._check_id(id)
        return bytes((id,)) if id < 256 else b""

    def byte_lengths(self) -> list[int]:
        return [1] * 256 + [0] * len(self.special_names)

    def to_plain(self) -> dict[str, Any]:
        # without added tokens the form, and so the fingerprint, of versions before 0.3
        return {"kind": self.kind} | ({"special_tokens": list(self.added)} if self.added else {})

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "ByteTokenizer":
        tokenizer = cls()
        tokenizer.added = tuple(plain.get("special_tokens", ()))
        more = dict(enumerate(tokenizer.added, start=cls.vocab_size))
        tokenizer.special_names = cls.special_names | more
        tokenizer.vocab_size = 256 + len(tokenizer.special_names)
        return tokenizer

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]


class CharTokenizer(Tokenizer):
    """The characters of a text in code-point order, then `<|pad|>`, `<|eos|>` and,
    with unknown="unk", `<|unk|>`; then special tokens that are added.

    >>> tokenizer = CharTokenizer("abn", unknown="error")
    >>> tokenizer.encode("banana"), tokenizer.eos_id
    ([1, 0, 2, 0, 2, 0], 4)
    """

    kind = "char"

    def __init__(
        self, characters: Iterable[str], *, unknown: str, special_tokens: Sequence[str] = ()
    ):
        self.characters = "".join(sorted(set(characters)))
        self.unknown = unknown
        n = len(self.characters)
        self.pad_id, self.eos_id = n, n + 1
        self.special_names = {n: "<|pad|>", n + 1: "<|eos|>"}
        self.unk_id = None
        if unknown == "unk":
            self.unk_id = n + 2
            self.special_names[n + 2] = "<|unk|>"
        self.added = tuple(special_tokens)
        self.special_names |= dict(enumerate(self.added, start=n + len(self.special_names)))
        self.vocab_size = n + len(self.special_names)
        self._code_points = _code_points(self.characters)

    @classmethod
    def of_documents(cls, documents: Iterable[str], *, unknown: str) -> "CharTokenizer":
        """The tokenizer for every character in `documents`.

        Raises:
            UserError: there is no character.
        """
        characters: set[str] = set()
        for document in documents:
            characters.update(document)
        if not characters:
            raise UserError(
                "tokenizer.kind",
                "char learns its vocabulary from the training documents, but they are empty",
                "Set data.dataset to a source with text",
            )
        return cls(characters, unknown=unknown)

    def token_bytes(self, id: int) -> bytes:
        self._check_id(id)
        if id == self.unk_id:  # it was a character of the text, so it is not nothing
            return "\ufffd".encode()
        return b"" if id in self.special_names else self.characters[id].encode()

    def to_plain(self) -> dict[str, Any]:
        plain = {"kind": self.kind, "characters": self.characters, "unknown": self.unknown}
        return plain | ({"special_tokens": list(self.added)} if self.added else {})

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "CharTokenizer":
        special_tokens = plain.get("special_tokens", ())
        return cls(plain["characters"], unknown=plain["unknown"], special_tokens=special_tokens)

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode_one(text) for text in texts]

    def _encode_one(self, text: str) -> np.ndarray:
        points = _code_points(text)
        # The vocabulary is sorted, so the position of a character in it is its id.
        ids = np.searchsorted(self._code_points, points).astype(np.uint32)
        known = self._code_points[np.minimum(ids, len(self._code_points) - 1)] == points
        if known.all():
            return ids
        if self.unk_id is None:
            position = int(np.argmin(known))
            character = text[position]
            raise UserError(
                f"position {position}",
                f"the character '{character}' (U+{ord(character):04X}) is not one of the "
                f"{len(self.characters)} characters of the tokenizer",
                "Set tokenizer.unknown: unk, or train on text that contains it",
            )
        ids[~known] = self.unk_id
        return ids


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
