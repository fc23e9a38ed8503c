"""Tokenizers of the `tokenizers` library, as published models have them: `HFTokenizer`,
and its stream decoder.

Knows nothing of files: hf_files.py reads them.
"""

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from tinylm.common.errors import UserError, catch_panics, first_line, reject_lone_surrogates
from tinylm.tokenizer.base import StreamDecoder, Tokenizer
from tinylm.tokenizer.pretokenize import BYTE_OF_CHARACTER, LAST_CUT
from tinylm.tokenizer.tiktoken_encoder import build_tiktoken_encoder, find_pattern

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

# Tokens that `WindowStream` keeps as context: more than any decoder looks back.
STREAM_WINDOW = 32


class HFTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library.

    Special are the added tokens that its files call special, and the tokens that its settings name
    (eos_token, pad_token, ...). Other added tokens (runs of spaces, `<think>`) are part of the
    text, as their authors meant. A text round-trips as far as the tokenizer's normalizer does not
    change it.

    Args:
        backend: the library's tokenizer.
        eos: the token that ends a text; it must exist.
        pad: the token for padding, or None to pad with eos.
        special: further tokens that no text may be encoded to.
        chat_template: the source of the template.
    """

    kind = "hf"

    def __init__(
        self,
        backend: "Backend",
        *,
        eos: str,
        pad: str | None,
        special: Iterable[str] = (),
        chat_template: str | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens(sorted({eos, *special} | ({pad} if pad else set())))
        backend.encode_special_tokens = True
        self._backend = backend
        self._json = backend.to_str()
        self.eos, self.pad, self.chat_template = eos, pad, chat_template
        self.vocab_size = backend.get_vocab_size()
        self.eos_id = backend.token_to_id(eos)
        self.pad_id = self.eos_id if pad is None else backend.token_to_id(pad)
        added = backend.get_added_tokens_decoder()
        self._added = {id: token.content for id, token in added.items()}
        self.special_names = {id: token.content for id, token in added.items() if token.special}
        self._in_text = [token for token in added.values() if not token.special]
        description = json.loads(self._json)
        self._byte_level = (description["decoder"] or {}).get("type") == "ByteLevel"
        self._bytes_of: dict[int, bytes] = {}  # of the tokens that were decoded
        # Text may be encoded to the unknown token, but never to eos or pad, even if one of them is
        # the unknown token.
        forbidden = set(self.special_names) - {_unknown_id(backend, description["model"])}
        forbidden |= {self.eos_id, self.pad_id}
        self._forbidden = np.array(sorted(forbidden), dtype=np.uint32)
        self._is_known = find_pattern(description) is not None
        self._can_cut = self._is_known and not any(map(_depends_on_neighbors, self._in_text))
        self.fast = build_tiktoken_encoder(description, forbidden)
        """tiktoken's encoder, if it gives the same ids"""

    def decode(self, ids: Sequence[int]) -> str:
        if self._byte_level:
            return super().decode(ids)
        for id in ids:
            self._check_id(id)
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> StreamDecoder:
        return super().stream() if self._byte_level else WindowStream(self)

    def token_bytes(self, id: int) -> bytes:
        self._check_id(id)
        if id in self.special_names:
            return b""
        if self.is_byte_token(id):
            return bytes.fromhex(self._backend.id_to_token(id)[3:5])
        if self._byte_level and id in self._added:
            return self._added[id].encode()
        if self._byte_level:
            if id not in self._bytes_of:
                token = self._backend.id_to_token(id)
                parts = [BYTE_OF_CHARACTER.get(c) or c.encode() for c in token]
                self._bytes_of[id] = b"".join(parts)
            return self._bytes_of[id]
        # The text that the token adds after itself: at the start of a text some decoders drop its
        # space.
        once = self._backend.decode([id])
        return self._backend.decode([id, id])[len(once) :].encode()

    def first_token_bytes(self, id: int) -> bytes:
        later = self.token_bytes(id)
        # Half a character decodes to U+FFFD alone.
        is_part = self.is_byte_token(id) and later >= b"\x80"
        if self._byte_level or id in self.special_names or is_part:
            return later
        return self._backend.decode([id]).encode()

    def is_byte_token(self, id: int) -> bool:
        """Whether `id` is one byte in the style of SentencePiece, `<0xE2>`,
        which is a character only with its neighbors.
        """
        if self._byte_level:
            return False
        return re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", self._backend.id_to_token(id)) is not None

    def encode_markup(self, text: str) -> list[int]:
        """The ids of a text that a template wrote,
        in which the names of special tokens are these tokens.

        Never for a user's text: it could contain special tokens.
        """
        reject_lone_surrogates(text)
        self._backend.encode_special_tokens = False
        try:
            return self._run_backend([text])[0].ids
        finally:
            self._backend.encode_special_tokens = True

    def to_plain(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "tokenizer_json": self._json,
            "eos": self.eos,
            "pad": self.pad,
            "chat_template": self.chat_template,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "HFTokenizer":
        """The inverse of `to_plain`."""
        backend = read_backend(plain["tokenizer_json"])
        ids = sorted(backend.get_vocab().values())
        if ids != list(range(len(ids))):
            raise ValueError(f"its {len(ids)} tokens do not have the ids 0 to {len(ids) - 1}")
        for name in ("eos", "pad"):
            if plain[name] is not None and backend.token_to_id(plain[name]) is None:
                raise ValueError(f"it has no token {plain[name]!r}")
        return cls(
            backend, eos=plain["eos"], pad=plain["pad"], chat_template=plain["chat_template"]
        )

    def last_cut(self, text: str) -> int:
        found = LAST_CUT.search(text) if self._can_cut else None
        return found.start() if found else 0

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self.fast is None:
            return self._encode_slowly(texts)
        return [self._encode_fast(text) for text in texts]

    def _encode_fast(self, text: str) -> np.ndarray:
        assert self.fast is not None
        # tiktoken knows no added tokens.
        if not any(token.content in text for token in self._in_text):
            with suppress(ValueError):  # its regex engine gave up
                return self.fast.encode(text)
        return self._encode_slowly([text])[0]

    def _encode_slowly(self, texts: Sequence[str]) -> list[np.ndarray]:
        result = []
        for text, encoding in zip(texts, self._run_backend(list(texts)), strict=True):
            ids = np.array(encoding.ids, dtype=np.uint32)
            has_special = np.isin(ids, self._forbidden).any()
            result.append(self._encode_apart(text) if has_special else ids)
        return result

    def _run_backend(self, texts: list[str], *, offsets: bool = False) -> list[Any]:
        """The library's encodings of the texts.

        Raises:
            UserError: a regular expression of an unknown pattern takes too long for a text.
        """
        encode = self._backend.encode_batch if offsets else self._backend.encode_batch_fast
        if self._is_known:
            return encode(texts, add_special_tokens=False)
        try:
            with catch_panics():
                return encode(texts, add_special_tokens=False)
        except RuntimeError as error:
            problem = f"the tokenizers library cannot encode a text: {first_line(error)}"
            raise UserError("tokenizer", problem, "Choose another tokenizer") from None

    def _encode_apart(self, text: str) -> np.ndarray:
        """The ids of a text that spells special tokens, each cut after its first character.

        `encode_special_tokens` stops the search for added tokens, but a model that looks up words
        (Unigram, WordLevel) still finds `</s>` in its vocabulary. If the tokenizer adds a space
        before each text, there is one more at the cut.

        Raises:
            UserError: a special token is a single character, so it cannot be cut.
        """
        [encoding] = self._run_backend([text], offsets=True)
        cuts = [0]
        for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if id not in self._forbidden:
                continue
            if end - start < 2:
                raise UserError(
                    "tokenizer",
                    f"the character '{text[start]}' is a special token, so no text can contain it",
                    "Choose another tokenizer",
                )
            cuts.append(start + 1)
        cuts.append(len(text))
        return np.concatenate(self._encode_slowly([text[a:b] for a, b in pairwise(cuts)]))


def read_backend(text: str) -> "Backend":
    """The library's tokenizer from the text of a tokenizer.json; RuntimeError if it is not one."""
    from tokenizers import Tokenizer as Backend

    with catch_panics():
        try:
            return Backend.from_str(text)
        except Exception as error:  # the library raises plain Exception for what it cannot read
            raise RuntimeError(first_line(error)) from None


def _unknown_id(backend: "Backend", model: dict[str, Any]) -> int | None:
    """The id for text that is not in the vocabulary: Unigram has it as an id,
    the other models as a token.
    """
    if model["type"] == "Unigram":
        return model["unk_id"]
    return None if model["unk_token"] is None else backend.token_to_id(model["unk_token"])


def _depends_on_neighbors(token: "AddedToken") -> bool:
    """Whether an added token is found or not by what is beside it,
    or could be cut in two by `LAST_CUT`.
    """
    return bool(token.lstrip or token.rstrip or token.single_word or LAST_CUT.search(token.content))


class WindowStream(StreamDecoder):
    """For tokenizers that can only decode whole texts:
    decodes the last tokens again and returns the new text.

    A run of byte tokens is decoded as a whole (one bad byte spoils all of it), so it is held back
    until it ends.
    """

    def __init__(self, tokenizer: HFTokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._n_returned = 0  # characters of decode(self._ids) that were returned

    def feed(self, id: int) -> str:
        self._tokenizer._check_id(id)
        if id in self._tokenizer.special_names:
            return ""
        self._ids.append(id)
        if self._tokenizer.is_byte_token(id):
            return ""
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        new = text[self._n_returned :]
        self._n_returned = len(text)
        if len(self._ids) > 2 * STREAM_WINDOW:
            self._ids = self._ids[-STREAM_WINDOW:]
            self._n_returned = len(self._tokenizer.decode(self._ids))
        return new

    def finish(self) -> str:
        rest = self._tokenizer.decode(self._ids)[self._n_returned :]
        self._n_returned += len(rest)
        return rest
