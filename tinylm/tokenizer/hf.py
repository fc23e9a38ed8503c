"""Text to token ids and back: one interface for byte, character and Hugging Face tokenizers.

Reading order: `Tokenizer`, what all of them can do; `ByteTokenizer`, `CharTokenizer` and `HFTokenizer`; the stream decoders,
which give text while its tokens are still coming; `make_tokenizer` and `tokenizer_from_plain`; then how the files of
a Hugging Face tokenizer are read.

Special tokens (end of text, padding, ...) are put between texts by this program and never come out of a text: a user who
types `<|endoftext|>` gets the characters, unless the caller allows that token by name. This file knows nothing of documents,
rows or models.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from tinylm.common.errors import UserError, first_line, printable
from tinylm.common.hub import hub_errors, is_hub_name, require_hub
from tinylm.text.documents import reject_lone_surrogates
from tinylm.tokenizer.base import BytesStream, StreamDecoder, Tokenizer
from tinylm.tokenizer.pretokenize import BYTE_OF_CHARACTER, LAST_CUT
from tinylm.tokenizer.tiktoken_encoder import FastBpe, fast_bpe, word_pattern

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


# Ends of text that published tokenizers use, tried where a tokenizer's files do not name one.
WELL_KNOWN_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")
# Vocabularies that transformers can turn into a tokenizer.json: SentencePiece's, WordPiece's and tiktoken's.
OLDER_VOCABULARIES = ("*.model", "vocab.txt", "*.tiktoken")
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "config.json",
)


class HFTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, as published models have them.

    Added tokens that the files call special, and those that the settings name (eos_token, pad_token, ...), are special here;
    other added tokens (runs of spaces, `<think>`) are part of the text, as their authors meant. A text round-trips as
    far as the tokenizer's normalizer leaves it alone.

    Args:
        backend: the library's tokenizer.
        eos: the token that ends a text; it must exist.
        pad: the token that fills rows, or None to fill with eos.
        special: further tokens that no text may become.
        chat_template: the template's source, kept as text.
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
        self._added = {
            id: token.content for id, token in backend.get_added_tokens_decoder().items()
        }
        self.special_names = {
            id: token.content
            for id, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        description = json.loads(self._json)
        self._byte_level = (description["decoder"] or {}).get("type") == "ByteLevel"
        # The unknown token does come out of text: that is what it is for. The end of a text never does.
        forbidden = set(self.special_names) - {_unknown_id(backend, description["model"])} | {
            self.eos_id,
            self.pad_id,
        }
        self._forbidden = np.array(sorted(forbidden), dtype=np.uint32)
        self._in_text = [
            token for token in backend.get_added_tokens_decoder().values() if not token.special
        ]
        plain = all(
            not (
                token.lstrip or token.rstrip or token.single_word or LAST_CUT.search(token.content)
            )
            for token in self._in_text
        )
        self._words_known = plain and word_pattern(description) is not None
        self.fast = fast_bpe(description, forbidden)
        """tiktoken's encoder, where it gives the same ids"""

    def decode(self, ids: Sequence[int]) -> str:
        if self._byte_level:
            return super().decode(ids)
        for id in ids:
            self._check_id(id)
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> "StreamDecoder":
        return BytesStream(self) if self._byte_level else WindowStream(self)

    def token_bytes(self, id: int) -> bytes:
        self._check_id(id)
        if id in self.special_names:
            return b""
        if self.is_byte_token(id):
            return bytes.fromhex(self._backend.id_to_token(id)[3:5])
        if self._byte_level and id in self._added:
            return self._added[id].encode()
        if self._byte_level:
            return b"".join(
                BYTE_OF_CHARACTER.get(c) or c.encode() for c in self._backend.id_to_token(id)
            )
        # What a token adds after another: at the very start of a text some decoders drop its space.
        return self._backend.decode([id, id])[len(self._backend.decode([id])) :].encode()

    def is_byte_token(self, id: int) -> bool:
        """Whether `id` is a single byte in the style of SentencePiece, `<0xE2>`, that only its neighbours make a character."""
        return (
            not self._byte_level
            and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", self._backend.id_to_token(id)) is not None
        )

    def encode_markup(self, text: str) -> list[int]:
        """The ids of a text that a template wrote: the special tokens that it spells are those tokens. Never for a user's text."""
        reject_lone_surrogates(text)
        self._backend.encode_special_tokens = False
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
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

    def last_cut(self, text: str) -> int:
        found = LAST_CUT.search(text) if self._words_known else None
        return found.start() if found else 0

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self.fast is None:
            return self._encode_slowly(texts)
        return [self._encode_fast(text, self.fast) for text in texts]

    def _encode_fast(self, text: str, fast: FastBpe) -> np.ndarray:
        if not any(token.content in text for token in self._in_text):
            with suppress(ValueError):
                return fast.encode(text)
        return self._encode_slowly([text])[0]

    def _encode_slowly(self, texts: Sequence[str]) -> list[np.ndarray]:
        batch = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        arrays = [np.array(encoding.ids, dtype=np.uint32) for encoding in batch]
        return [
            self._encode_apart(text) if np.isin(ids, self._forbidden).any() else ids
            for text, ids in zip(texts, arrays, strict=True)
        ]

    def _encode_apart(self, text: str) -> np.ndarray:
        """The ids of a text that spells special tokens, each cut behind its first character.

        `encode_special_tokens` stops the search for added tokens, but a model that looks words up (Unigram, WordLevel)
        still finds `</s>` in its vocabulary. A tokenizer that opens each text with a space then has one more at the cut.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        places = [
            place
            for id, place in zip(encoding.ids, encoding.offsets, strict=True)
            if id in self._forbidden
        ]
        if any(end - start < 2 for start, end in places):
            character = printable(text[places[0][0]])
            raise UserError(
                f"the character '{character}' is a special token of this tokenizer, so no text can have it. Choose another tokenizer."
            )
        cuts = [0, *(start + 1 for start, _ in places), len(text)]
        return np.concatenate(
            self._encode_slowly([text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)])
        )


def _unknown_id(backend: "Backend", model: dict[str, Any]) -> int | None:
    """The id for what the vocabulary lacks: Unigram names it by its id, the others by its text."""
    if model["type"] == "Unigram":
        return model["unk_id"]
    return None if model["unk_token"] is None else backend.token_to_id(model["unk_token"])


@dataclass(frozen=True)
class Fit:
    """What a tokenizer makes of a text."""

    n_bytes: int
    n_tokens: int
    n_used: int
    """different tokens that stand in the text"""
    longest: list[int]
    """the ids of the longest of them in bytes, the longest first"""

    @classmethod
    def of(cls, tokenizer: Tokenizer, texts: Iterable[str], *, n_longest: int = 3) -> "Fit":
        """How `tokenizer` fits these texts, each encoded by itself."""
        n_bytes = 0
        uses = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        for text in texts:
            n_bytes += len(text.encode())
            uses += np.bincount(tokenizer.encode_arrays([text])[0], minlength=len(uses))
        lengths = tokenizer.byte_lengths()
        used = sorted(np.flatnonzero(uses).tolist(), key=lambda id: -lengths[id])
        return cls(n_bytes, int(uses.sum()), len(used), used[:n_longest])


def load_hf_tokenizer(path: str) -> HFTokenizer:
    """The tokenizer in the folder `path` or, where nothing has that name here, of the Hugging Face model `path`.

    A folder has tokenizer.json, or GPT-2's vocab.json and merges.txt, or what transformers can turn into the first; a
    tokenizer_config.json or special_tokens_map.json beside it says which tokens end and pad a text.

    Raises:
        UserError: naming the file and what is wrong with it, or how to do without the network.
    """
    if os.path.isdir(path):
        return _read_folder(Path(path))
    if os.path.lexists(path) or not is_hub_name(path):
        found = "is not a folder" if os.path.lexists(path) else "not found"
        raise UserError(
            f"tokenizer.path: {printable(path)}: {found}. Give a folder with tokenizer.json, or a Hugging Face name such as gpt2."
        )
    return _read_folder(_download(path))


def _download(name: str) -> Path:
    """The folder in the library's cache that holds the tokenizer files of the Hugging Face model `name`."""
    from huggingface_hub import snapshot_download

    mend = "Give a local folder with tokenizer.json, or vocab.json and merges.txt."
    require_hub(f"tokenizer.path: {name}", mend)
    try:
        return Path(snapshot_download(name, allow_patterns=[*TOKENIZER_FILES, *OLDER_VOCABULARIES]))
    except (*hub_errors(), ValueError) as error:
        raise UserError(
            f"tokenizer.path: {name}: not a folder here, and the Hugging Face hub says: {first_line(error)}. {mend}"
        ) from error


def _read_folder(folder: Path) -> HFTokenizer:
    settings = _read_settings(folder)
    file, backend = _read_backend(folder)
    vocabulary = backend.get_vocab()
    _check_ids(vocabulary, file)
    _check_named(settings, vocabulary, folder)
    special = {name for name in settings.special if name in vocabulary}
    # vocab.json does not tell special tokens from others, but no merge makes these names.
    added = (
        vocabulary.keys()
        if file.name == "vocab.json"
        else {token.content for token in backend.get_added_tokens_decoder().values()}
    )
    eos = settings.eos or next(
        (name for name in WELL_KNOWN_EOS if name in special or name in added), None
    )
    if eos is None:
        where = printable(folder / "tokenizer_config.json")
        raise UserError(
            f'{printable(file)}: no end-of-text token. Name one of its tokens in {where}: {{"eos_token": "..."}}.'
        )
    return HFTokenizer(
        backend, eos=eos, pad=settings.pad, special=special, chat_template=settings.chat_template
    )


def _read_backend(folder: Path) -> tuple[Path, "Backend"]:
    """The library's tokenizer from the files in `folder`, and the file to name where something is wrong with it."""
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json", _read_tokenizer_json(folder / "tokenizer.json")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return folder / "vocab.json", _read_gpt2(folder / "vocab.json", folder / "merges.txt")
    older = sorted(path for pattern in OLDER_VOCABULARIES for path in folder.glob(pattern))
    if older:  # without one, transformers would make a tokenizer that knows no text
        return older[0], _convert(folder)
    found = "no tokenizer.json here, and no vocab.json with merges.txt"
    raise UserError(
        f"tokenizer.path: {printable(folder)}: {found}. Give the folder that holds a tokenizer."
    )


@dataclass
class _Settings:
    """What the files beside a tokenizer say of it."""

    named: dict[str, str] = field(default_factory=dict)
    """eos_token, pad_token, ... and the token's text"""
    files: dict[str, Path] = field(default_factory=dict)
    """which file names it"""
    special: set[str] = field(default_factory=set)
    chat_template: str | None = None

    @property
    def eos(self) -> str | None:
        return self.named.get("eos_token")

    @property
    def pad(self) -> str | None:
        return self.named.get("pad_token")


def _read_settings(folder: Path) -> _Settings:
    """The settings in special_tokens_map.json and, before it, tokenizer_config.json."""
    settings = _Settings()
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        if file.is_file():
            _add_settings(settings, file)
    if (folder / "chat_template.jinja").is_file():
        settings.chat_template = _read_text(folder / "chat_template.jinja")
    # The unknown token comes out of text that the vocabulary lacks: it is not kept apart.
    settings.special |= {token for key, token in settings.named.items() if key != "unk_token"}
    return settings


def _add_settings(settings: _Settings, file: Path) -> None:
    values = _read_object(file)
    for key, value in values.items():
        if (
            key.endswith("_token") and value is not None and not isinstance(value, bool)
        ):  # add_bos_token is a switch
            settings.named[key] = _token_name(value, file, key)
            settings.files[key] = file
    further = values.get("additional_special_tokens") or []
    if not isinstance(further, list):
        raise UserError(
            f"{printable(file)}: additional_special_tokens: expected a list of tokens, found {_shown(further)}. Write a list."
        )
    settings.special |= {_token_name(token, file, "additional_special_tokens") for token in further}
    if isinstance(values.get("chat_template"), str):
        settings.chat_template = values["chat_template"]


def _shown(value: Any) -> str:
    """A JSON value, short enough for a message."""
    return printable(json.dumps(value))[:100]


def _token_name(value: Any, file: Path, key: str) -> str:
    """The text of a token, which the files give as a string or as an object with `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise UserError(
            f"{printable(file)}: {printable(key)}: expected a token's text, found {_shown(value)}. Write the text of one token."
        )
    return content


def _check_named(settings: _Settings, vocabulary: dict[str, int], folder: Path) -> None:
    for key, token in (("eos_token", settings.eos), ("pad_token", settings.pad)):
        if token is not None and token not in vocabulary:
            found = f"the tokenizer in {printable(folder)} has no token {printable(token)}"
            raise UserError(
                f"{printable(settings.files[key])}: {key}: {found}. Name one that it has, or add it."
            )


def _check_ids(vocabulary: dict[str, int], file: Path) -> None:
    """Ids are rows of the embedding, so n tokens need the ids from 0 to n - 1, each once."""
    missing = sorted(set(range(len(vocabulary))) - set(vocabulary.values()))
    if missing or not vocabulary:
        highest = max(vocabulary.values(), default=None)
        expected = f"its {len(vocabulary)} tokens need the ids from 0 to {len(vocabulary) - 1}"
        found = (
            f"{missing[0]} is missing (the highest is {highest})" if missing else "there are none"
        )
        raise UserError(f"{printable(file)}: {expected}, and {found}. Export the tokenizer again.")


def _read_tokenizer_json(file: Path) -> "Backend":
    from tokenizers import Tokenizer as Backend

    description = _read_object(file)
    try:
        backend = Backend.from_str(_read_text(file))
    except Exception as error:  # the library raises plain Exception for whatever it cannot read
        _not_a_tokenizer(file, error)
    for token in description.get("added_tokens", []):
        place = backend.token_to_id(token["content"])
        if token["id"] != place:  # the library gives such a token the next free id and says nothing
            found = f"id {token['id']}, but with {backend.get_vocab_size()} tokens in all its place is {place}"
            raise UserError(
                f"{printable(file)}: added token {printable(token['content'])}: {found}. Export the tokenizer again."
            )
    return backend


def _read_gpt2(vocab_file: Path, merges_file: Path) -> "Backend":
    """Byte-level BPE as GPT-2 published it: token ids in JSON, and one merge a line in the order they were learned."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = _read_object(vocab_file)
    for token, id in vocabulary.items():
        if type(id) is not int or id < 0:
            raise UserError(
                f"{printable(vocab_file)}: {printable(token)}: expected an id from 0 on, found {_shown(id)}. Export the tokenizer again."
            )
    _check_ids(vocabulary, vocab_file)
    merges = []
    for number, line in enumerate(_read_text(merges_file).split("\n"), start=1):
        pair = line.rstrip("\r").split(" ")
        if line.startswith("#version") or pair == [""]:
            continue
        if len(pair) != 2:
            raise UserError(
                f"{printable(merges_file)}:{number}: expected two tokens and a space between, found {_shown(line)}. Export it again."
            )
        merges.append((pair[0], pair[1]))
    try:
        backend = Backend(models.BPE(vocabulary, merges))
    except (
        Exception
    ) as error:  # the library raises plain Exception, as for a merge whose result is no token
        _not_a_tokenizer(merges_file, error)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _not_a_tokenizer(file: Path, error: Exception) -> NoReturn:
    raise UserError(
        f"{printable(file)}: not a tokenizer: {first_line(error)}. Export the tokenizer again."
    ) from error


def _convert(folder: Path) -> "Backend":
    """A tokenizer of an older format (SentencePiece's tokenizer.model), turned into the library's by transformers."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ).backend_tokenizer
    except (
        OSError,
        ValueError,
        ImportError,
        AttributeError,
    ) as error:  # AttributeError: transformers knows it in Python only
        found = f"no tokenizer.json, and transformers cannot make one: {first_line(error)}"
        raise UserError(
            f"tokenizer.path: {printable(folder)}: {found}. Export the tokenizer with tokenizer.json."
        ) from error


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{printable(file)}: not UTF-8 text (byte {error.start}). Export the tokenizer again."
        ) from None
    except OSError as error:
        raise UserError(
            f"{printable(file)}: {error.strerror}. Give a folder whose files can be read."
        ) from None


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{printable(file)}: not JSON, or cut off: {first_line(error)}. Export the tokenizer again."
        ) from None
    if not isinstance(value, dict):
        raise UserError(
            f"{printable(file)}: expected a JSON object, found {type(value).__name__}. Export the tokenizer again."
        )
    return value


# Tokens kept as context while a stream is decoded: more than any decoder looks back.
STREAM_WINDOW = 32


class WindowStream(StreamDecoder):
    """For tokenizers that only decode whole texts: decodes the last tokens again and gives what is new.

    A run of byte tokens is decoded as a whole (one bad byte spoils all of it), so it is held until it ends.
    """

    def __init__(self, tokenizer: HFTokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # characters of decode(self._ids) that were given out

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
        new, self._shown = text[self._shown :], len(text)
        if len(self._ids) > 2 * STREAM_WINDOW:
            self._ids = self._ids[-STREAM_WINDOW:]
            self._shown = len(self._tokenizer.decode(self._ids))
        return new

    def finish(self) -> str:
        rest = self._tokenizer.decode(self._ids)[self._shown :]
        self._shown += len(rest)
        return rest
