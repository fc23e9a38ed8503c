r"""How a text is split into words before BPE, and how bytes are written as visible characters.

Reading order: the patterns of words; where a text can be cut without changing its words;
`Pretokenizer`, `count_words` and `count_chunk`, the work of one process on one chunk of a corpus;
GPT-2's visible form of bytes. Knows nothing of merges or ids. The processes that count words import
this file, so it needs neither torch, numpy nor pydantic.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import regex

from tinylm.common.errors import UserError
from tinylm.config.split_pattern import isolated_words
from tinylm.text.chunks import RawChunk
from tinylm.text.documents import TextChunk

# No merge crosses the border of a word. gpt2: the words of GPT-2 (Radford et al. 2019). gpt4: the
# words of GPT-4, from tiktoken's cl100k_base, with at most three digits per word and contractions
# in either case. Every character is in a word. `tokenizers` and tiktoken find the same words; so
# does `regex`, except for letters that Unicode added last. A custom regular expression is
# checked where it is read (config/split_pattern.py).
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


def byte_level_pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The pattern of the words of a byte-level `pre_tokenizer` of a tokenizer.json,
    as `tokenizers` writes it; None if it is another kind.

    >>> pattern = byte_level_pattern(
    ...     {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True}
    ... )
    >>> pattern == PATTERNS["gpt2"]
    True
    """
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return PATTERNS["gpt2"]
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    return None


# Where a text can be cut without changing its words under any pattern: before a space after a
# word, after a single line end, and before punctuation after a letter. Letters are listed, because
# libraries differ in the newest ones.
_CUT = r"(?<=\S)(?=[ \t])|(?<=\S\n)(?=\S)|(?<=[a-z\u4e00-\u9fa5])(?=[!-/\u3001\u3002\uff0c])"
LAST_CUT = regex.compile(f"(?r){_CUT}")  # (?r): searches from the end

SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>")


@dataclass(frozen=True)
class Pretokenizer:
    """Splits texts into words: the name of a pattern or a regular expression,
    and the special tokens, which belong to no word.
    """

    pattern: str = "gpt2"
    special_tokens: tuple[str, ...] = SPECIAL_TOKENS

    @property
    def expression(self) -> str:
        """The regular expression whose matches are the words."""
        return PATTERNS.get(self.pattern, self.pattern)

    def stretches(self, text: str) -> list[str]:
        """The text between special tokens."""
        _, special = _compile(self)
        return special.split(text) if special else [text]

    def split(self, text: str) -> list[str]:
        """The words of a text, in order; without special tokens. If special tokens overlap,
        the longest one counts. What a regular expression does not match is a word too.

        >>> Pretokenizer().split("Hello world's<|endoftext|>  end")
        ['Hello', ' world', "'s", ' ', ' end']

        Raises:
            UserError: a regular expression takes too long.
        """
        word, _ = _compile(self)
        words: list[str] = []
        for stretch in self.stretches(text):
            if self.pattern in PATTERNS:  # whose matches leave nothing between them
                words += word.findall(stretch)
            else:
                words += _words_in_time(word, stretch)
        return words


@lru_cache
def _compile(
    pretokenizer: Pretokenizer,
) -> tuple[regex.Pattern[str], regex.Pattern[str] | None]:
    word = regex.compile(pretokenizer.expression)
    if not pretokenizer.special_tokens:
        return word, None
    longest_first = sorted(pretokenizer.special_tokens, key=len, reverse=True)
    return word, regex.compile("|".join(map(regex.escape, longest_first)))


def _words_in_time(word: regex.Pattern[str], text: str) -> list[str]:
    try:
        return isolated_words(word, text)
    except TimeoutError:
        raise UserError(
            "tokenizer.pattern",
            f"{word.pattern} backtracks without end in a text of {len(text)} characters that "
            f"begins with {text[:40]!r}",
            "Write a pattern without nested repetitions, or remove the text",
        ) from None


def count_words(texts: Iterable[str], pretokenizer: Pretokenizer) -> Counter[str]:
    """How often each word occurs in the texts.

    >>> count_words(["low low", "low"], Pretokenizer())
    Counter({'low': 2, ' low': 1})
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(pretokenizer.split(text))
    return counts


def count_chunk(
    pretokenizer: Pretokenizer, chunk: RawChunk | TextChunk
) -> tuple[int, Counter[str]]:
    """The size of a chunk and its words: the work of one process."""
    return chunk.size, count_words(chunk.texts(), pretokenizer)


# GPT-2's character for each byte in vocabulary files (Radford et al. 2019): the visible characters
# of Latin-1 as themselves, the other 68 bytes, in their order, as U+0100, U+0101, ...
_VISIBLE = [byte for byte in range(256) if 0x21 <= byte <= 0x7E or byte >= 0xA1 and byte != 0xAD]
_HIDDEN = sorted(set(range(256)) - set(_VISIBLE))
CHARACTER_OF_BYTE = {byte: chr(byte) for byte in _VISIBLE}
CHARACTER_OF_BYTE |= {byte: chr(256 + n) for n, byte in enumerate(_HIDDEN)}
BYTE_OF_CHARACTER = {character: bytes([byte]) for byte, character in CHARACTER_OF_BYTE.items()}


def gpt2_form(token: bytes) -> str:
    """A token in visible characters, as GPT-2's files write it.

    >>> gpt2_form(b" a\\n")
    'ĠaĊ'
    """
    return "".join(CHARACTER_OF_BYTE[byte] for byte in token)
